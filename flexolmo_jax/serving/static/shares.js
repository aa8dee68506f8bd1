// A bar for each source: its share, as a length and as a number.

/** A share as people read it; what is little is not called nothing. */
export function percent(share) {
  if (share > 0 && share < 0.0005) return "<0.1%";
  if (share < 1 && share >= 0.9995) return ">99.9%";
  return `${(100 * share).toFixed(1)}%`;
}

/** Rows of name, bar and number; `set` changes the shares. */
export class Shares {
  #rows = new Map();

  /** `looks`: pairs of a source and its CSS class; `off`: the sources without part in the answer. */
  constructor(list, looks, off = []) {
    for (const [name, look] of looks) {
      const row = document.createElement("li");
      const fill = element("span", "fill");
      const value = element("span", "value");
      const bar = element("span", "bar");
      bar.append(fill);
      const label = element("span", "name");
      label.textContent = name;
      row.className = look;
      row.classList.toggle("off", off.includes(name));
      value.textContent = off.includes(name) ? "off" : "–";
      row.append(label, " ", bar, value);
      list.append(row);
      if (!off.includes(name)) this.#rows.set(name, { fill, value });
    }
  }

  /** Shows shares; `of` says the share of a name. */
  set(of) {
    for (const [name, { fill, value }] of this.#rows) {
      fill.style.setProperty("--share", of(name));
      value.textContent = percent(of(name));
    }
  }
}

function element(tag, className) {
  const made = document.createElement(tag);
  made.className = className;
  return made;
}
