// Buttons that copy a text.

/** Lets a button copy what `text()` says, and say so for a moment. */
export function copies(button, text) {
  const name = button.textContent;
  button.addEventListener("click", async () => {
    const done = await copy(text());
    button.textContent = done ? "Copied" : "The browser refused";
    setTimeout(() => (button.textContent = name), 1500);
  });
}

async function copy(text) {
  // Without HTTPS, a browser has no navigator.clipboard, except on this machine.
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const area = document.createElement("textarea");
  const focused = document.activeElement;
  area.className = "unseen";
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}
