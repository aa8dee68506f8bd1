// The exact weights of a word: beside it where the pointer or the focus is, and read out on focus.
import { Shares, percent } from "./shares.js";

const tip = document.getElementById("tip");
const spoken = document.getElementById("weights");
let hiding = 0;

/** Shows weights on the words in `box`; `find(span)` says {text, mass, looks} of a word's element. */
export function explainWords(box, find) {
  const wordOf = (event) => event.target.closest?.(".word");
  box.addEventListener("pointerover", (event) => wordOf(event) && show(wordOf(event), find));
  box.addEventListener("pointerout", hideSoon);
  box.addEventListener("click", (event) => {
    wordOf(event)?.focus();
    if (wordOf(event)) show(wordOf(event), find); // a second tap brings no focus
  });
  box.addEventListener("focusin", (event) => {
    const word = wordOf(event);
    if (!word) return;
    box.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    word.tabIndex = 0;
    show(word, find);
    const { mass } = find(word);
    spoken.textContent = sorted(find(word)).map(([n]) => `${n} ${percent(mass.share(n))}`).join(", ");
  });
  box.addEventListener("focusout", hideSoon);
  box.addEventListener("keydown", (event) => move(box, event));
}

/** Hides the weights; says whether they were shown. */
export function hideTip() {
  const shown = !tip.hidden;
  tip.hidden = true;
  return shown;
}

function move(box, event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const words = [...box.querySelectorAll(".word:not([hidden])")];
  const at = words.indexOf(event.target);
  const goal = {
    ArrowRight: at + 1,
    ArrowLeft: at - 1,
    ArrowDown: beyond(words, at, 1),
    ArrowUp: beyond(words, at, -1),
    Home: 0,
    End: words.length - 1,
  }[event.key];
  if (goal === undefined) return;
  event.preventDefault();
  words[Math.max(0, Math.min(goal, words.length - 1))].focus();
}

/** The word nearest to word `at` on the next line in a direction. */
function beyond(words, at, step) {
  const middle = (word) => word.getBoundingClientRect().left + word.offsetWidth / 2;
  const top = (i) => words[i]?.getBoundingClientRect().top;
  let best = at;
  let line;
  for (let i = at + step; i >= 0 && i < words.length; i += step) {
    if (Math.abs(top(i) - top(at)) < 4) continue;
    line ??= top(i);
    if (Math.abs(top(i) - line) > 4) break;
    const nearer = Math.abs(middle(words[i]) - middle(words[at]));
    if (best === at || nearer < Math.abs(middle(words[best]) - middle(words[at]))) best = i;
  }
  return best;
}

const sorted = ({ mass, looks }) => [...looks].sort(([a], [b]) => mass.share(b) - mass.share(a));

function show(word, find) {
  clearTimeout(hiding);
  const found = find(word);
  const title = document.createElement("strong");
  title.textContent = found.text;
  const list = document.createElement("ul");
  list.className = "shares";
  new Shares(list, sorted(found)).set((name) => found.mass.share(name));
  tip.replaceChildren(title, list);
  tip.hidden = false;
  place(word.getClientRects()[0]);
}

function place(rect) {
  const { offsetWidth: width, offsetHeight: height } = tip;
  const edge = document.documentElement.clientWidth - width - 8;
  const left = Math.max(8, Math.min(rect.left + rect.width / 2 - width / 2, edge));
  const below = rect.bottom + 8 + height < innerHeight || rect.top < height + 8;
  tip.style.setProperty("left", `${left + scrollX}px`);
  tip.style.setProperty("top", `${(below ? rect.bottom + 8 : rect.top - height - 8) + scrollY}px`);
}

function hideSoon() {
  clearTimeout(hiding);
  hiding = setTimeout(() => {
    const focused = document.activeElement?.matches?.(".word:focus-visible");
    if (!tip.matches(":hover") && !focused) hideTip();
  }, 150);
}

tip.addEventListener("pointerleave", hideSoon);
