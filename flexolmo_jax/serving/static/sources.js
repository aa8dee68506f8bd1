// The switches: one for each source that the key may use, and which of them are off.

const LOOKS = 8; // page.css has that many pairs of colour and line

/** The sources of a model, as switches in `list`. */
export class Sources {
  #list;
  #onChange;
  #off = new Set();
  #looks = new Map();
  names = [];
  #fixed = new Set();

  constructor(list, onChange) {
    this.#list = list;
    this.#onChange = onChange;
  }

  /** Shows the sources of `model`; what is off stays off, where the model still has it. */
  show(model, base = model) {
    base.experts.forEach((name, i) => this.#looks.set(name, `look-${i % LOOKS}`));
    this.names = model.experts;
    this.#fixed = new Set(model.always_on ?? base.always_on ?? []);
    this.#off = new Set(this.names.filter((name) => this.#off.has(name) && !this.#fixed.has(name)));
    if (this.#off.size === this.names.length) this.#off.clear();
    this.#list.replaceChildren(...this.names.map((name) => this.#row(name)));
    this.#explain();
  }

  /** Forgets all names, as another key may not see them. */
  clear() {
    this.names = [];
    this.#off.clear();
    this.#looks.clear();
    this.#list.replaceChildren();
  }

  /** The names of the sources that are off, in the model's order. */
  get off() {
    return this.names.filter((name) => this.#off.has(name));
  }

  /** The sources that could be switched off as well. */
  get optional() {
    const on = this.names.filter((name) => !this.#off.has(name));
    return on.length > 1 ? on.filter((name) => !this.#fixed.has(name)) : [];
  }

  /** The CSS class that shows a source. */
  look(name) {
    return this.#looks.get(name) ?? "";
  }

  #row(name) {
    const row = document.getElementById("source").content.cloneNode(true).firstElementChild;
    const [input, label, reason] = ["input", ".name", ".reason"].map((s) => row.querySelector(s));
    row.dataset.source = name;
    row.querySelector(".source").classList.add(this.look(name));
    label.textContent = name;
    input.checked = !this.#off.has(name);
    reason.id = `reason-${this.names.indexOf(name)}`;
    // A switch that stays on can be focused, so that its reason is heard.
    input.addEventListener("click", (event) => {
      if (input.getAttribute("aria-disabled") === "true") event.preventDefault();
    });
    input.addEventListener("change", () => {
      this.#off[input.checked ? "delete" : "add"](name);
      this.#explain();
      this.#onChange();
    });
    return row;
  }

  /** Says at each switch that cannot be turned off why it cannot. */
  #explain() {
    const lastOn = this.names.length - this.#off.size === 1;
    for (const row of this.#list.children) {
      const name = row.dataset.source;
      const [input, reason] = ["input", ".reason"].map((s) => row.querySelector(s));
      let why = "";
      if (this.#fixed.has(name)) why = "always on";
      else if (lastOn && !this.#off.has(name)) why = "one must stay on";
      reason.textContent = why;
      input.setAttribute("aria-disabled", String(Boolean(why)));
      if (why) input.setAttribute("aria-describedby", reason.id);
      else input.removeAttribute("aria-describedby");
    }
  }
}
