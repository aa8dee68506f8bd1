// Where the words of an answer stand in owners' documents: asked on demand, shown below the answer.
import { say } from "./announce.js";
import { readTrace } from "./api.js";

const SHOWN = 3; // places of a span, at first

/**
 * Offers to trace an answer.
 *
 * `id`: the server's; `owners`: who can be asked; `looks`: the CSS class of each source.
 */
export function offerTrace(element, id, owners, looks) {
  const [button, panel] = [element.querySelector(".trace"), element.querySelector(".traced")];
  button.hidden = false;
  button.title = `Asks ${owners.join(", ")} where the same words stand. They read the answer.`;
  button.addEventListener("click", async () => {
    button.disabled = true;
    button.textContent = "Asking the owners…";
    const parts = await readTrace(id).then(
      (trace) => draw(trace, looks),
      (error) => [made("p", "hint", `The answer cannot be traced: ${error.message}`)],
    );
    button.disabled = false;
    button.textContent = "Trace again";
    panel.replaceChildren(...parts);
    panel.setAttribute("aria-label", "Trace of the answer");
    panel.hidden = false;
    panel.focus({ preventScroll: true });
    say(panel.querySelector(".hint").textContent);
  });
}

function draw(trace, looks) {
  const groups = stretches(trace.spans);
  const title = made("h4", "", "Where the same words stand");
  const summary = made("p", "hint", summaryOf(trace));
  if (!groups.length) return [title, summary];
  const list = made("ol", "spans");
  const buttons = groups.map((group, i) => highlight(trace.text, group, i));
  for (const span of trace.spans) list.append(row(trace.text, span, looks));
  const text = made("p", "text");
  let from = 0;
  groups.forEach((group, i) => {
    text.append(slice(trace.text, from, group.start), buttons[i]);
    from = group.stop;
  });
  text.append(slice(trace.text, from));
  choosing(buttons, groups, list);
  return [title, summary, text, list];
}

/** A click on a highlight leaves only its spans in the list; another click shows all again. */
function choosing(buttons, groups, list) {
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => {
      const chosen = button.getAttribute("aria-pressed") !== "true";
      for (const other of buttons) other.setAttribute("aria-pressed", String(chosen && other === button));
      [...list.children].forEach((item, j) => (item.hidden = chosen && !groups[i].numbers.includes(j)));
    });
  });
  [...list.children].forEach((item, j) => {
    item.querySelector("button").addEventListener("click", () => {
      const at = groups.findIndex(({ numbers }) => numbers.includes(j));
      if (buttons[at].getAttribute("aria-pressed") !== "true") buttons[at].click();
      buttons[at].focus();
    });
  });
}

function summaryOf({ spans, asked, missing }) {
  const gone = Object.entries(missing).map(([name, why]) => `${name} (${why})`);
  const said = asked.filter((name) => !(name in missing));
  const count = spans.length === 1 ? "One span" : `${spans.length} spans`;
  const parts = [];
  if (said.length) {
    parts.push(`${spans.length ? count : "No span"} of this answer ${spans.length > 1 ? "stand" : "stands"} verbatim in documents of ${names(spans, said)}, by what their owners let be said.`);
    if (spans.length) parts.push("It is where the same words stand, not why the model wrote them.");
  }
  if (gone.length) parts.push(`Not heard: ${gone.join("; ")}.`);
  if (!asked.length) parts.push("There is no owner to ask.");
  return parts.join(" ");
}

/** The owners that have some of the spans; of none, those that answered. */
function names(spans, said) {
  const having = said.filter((name) => spans.some(({ counts }) => name in counts));
  return (having.length ? having : said).join(" and ");
}

/** Spans that overlap are one highlight: {start, stop, numbers of the spans}. */
function stretches(spans) {
  const groups = [];
  spans.forEach(({ start, stop }, i) => {
    const last = groups.at(-1);
    if (last && start < last.stop) {
      last.stop = Math.max(last.stop, stop);
      last.numbers.push(i);
    } else {
      groups.push({ start, stop, numbers: [i] });
    }
  });
  return groups;
}

function highlight(text, { start, stop }, i) {
  const button = made("button", "found", slice(text, start, stop));
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  button.title = `Show only the places of span ${i + 1}`;
  return button;
}

/** A span: its words, how often who has them, and the places that were shown. */
function row(text, span, looks) {
  const item = made("li");
  const words = made("button", "quiet locate", `“${short(slice(text, span.start, span.stop))}”`);
  words.type = "button";
  words.title = "Show these words in the answer";
  const counts = made("p", "hint counts");
  for (const [owner, count] of Object.entries(span.counts)) {
    counts.append(name(owner, looks), ` ${count === 1 ? "once" : `${count} times`} `);
  }
  const places = made("ul", "places");
  for (const passage of span.passages) places.append(place(passage, looks));
  item.append(words, counts, places);
  if (span.passages.length > SHOWN) item.append(more(places));
  return item;
}

/** Hides all places but the first ones; a button that shows them. */
function more(places) {
  const rest = [...places.children].slice(SHOWN);
  const button = made("button", "secondary small more", `${rest.length} more`);
  button.type = "button";
  for (const item of rest) item.hidden = true;
  button.addEventListener("click", () => {
    for (const item of rest) item.hidden = false;
    rest[0].tabIndex = -1;
    rest[0].focus();
    button.remove();
  });
  return button;
}

function place({ owner, document: id, source, licence, before, match, after }, looks) {
  const item = made("li");
  const about = made("p", "about");
  about.append(name(owner, looks), ` ${[id, source].filter(Boolean).join(" · ")} `);
  about.append(made("span", "licence", licence || "no licence given"));
  item.append(about);
  if (before || after) {
    const quote = made("blockquote");
    quote.append(`…${before}`, made("mark", "", match), `${after}…`);
    item.append(quote);
  }
  return item;
}

const name = (owner, looks) => made("strong", `owner ${looks.get(owner) ?? ""}`, owner);
const short = (words) => (words.length > 120 ? `${words.slice(0, 100)} … ${words.slice(-15)}` : words);

/** Python counts characters, and JavaScript counts UTF-16 units. */
const slice = (text, start, stop) => Array.from(text).slice(start, stop).join("");

function made(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}
