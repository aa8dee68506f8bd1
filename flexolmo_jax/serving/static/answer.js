// One answer on the page: its words as they arrive, the bar of each source, its figures.
import { copies } from "./copy.js";
import { Shares } from "./shares.js";
import { explainWords } from "./tip.js";
import { offerTrace } from "./trace.js";
import { Words } from "./words.js";

const SHOWN_OF_PROMPT = 280; // characters

const ENDINGS = {
  stop: "end of text",
  length: "limit reached",
  expert_withdrawn: "ended: a source was withdrawn",
  timeout: "ended: the server's time limit",
  shutdown: "ended: the server shuts down",
  stopped: "stopped by you",
  failed: "ended by an error",
};

/** An answer that grows. */
export class Answer {
  text = "";
  tokens = 0;
  shares = null; // the server's own, at the end
  #words = new Words();
  #spans = [];
  #looks; // of every source of the model
  #on; // of those that may answer
  #box;
  #bars;
  #drawn = false;
  #traced;
  #started = performance.now();
  #first = 0;

  /**
   * `sources`: a Sources; `off`: the names without part in the answer; `traced`: the names of the
   * sources whose owners can be asked where the answer's words stand.
   */
  constructor(title, prompt, sources, off, traced) {
    this.title = title;
    this.#traced = traced.filter((name) => !off.includes(name));
    this.element = document.getElementById("answer").content.cloneNode(true).firstElementChild;
    const find = (selector) => this.element.querySelector(selector);
    this.#looks = new Map(sources.names.map((name) => [name, sources.look(name)]));
    this.#on = new Map([...this.#looks].filter(([name]) => !off.includes(name)));
    find("h3").textContent = title;
    const long = prompt.length > SHOWN_OF_PROMPT;
    find(".asked").textContent = long ? `…${prompt.slice(-SHOWN_OF_PROMPT)}` : prompt;
    find(".text").setAttribute("aria-label", `${title}: prompt and answer`);
    this.#box = find(".words");
    this.#bars = new Shares(find(".shares"), this.#looks, off);
    this.element.setAttribute("aria-busy", "true");
    copies(find(".copy"), () => this.text);
    explainWords(this.#box, (span) => {
      const { text, mass } = this.#words.list[this.#spans.indexOf(span)];
      return { text, mass, looks: this.#on };
    });
  }

  /** Adds what a chunk's choice brought. */
  add({ text, token_mass: tokens, expert_mass: shares }) {
    if (text && !this.#first) this.#first = performance.now();
    this.text += text;
    if (tokens?.length) {
      const from = Math.max(0, this.#words.list.length - 1);
      for (const token of tokens) this.#words.add(token.text, token.mass);
      this.#draw(from);
    } else {
      this.#box.append(text);
    }
    this.shares = shares ?? this.shares;
    this.#drawSharesSoon();
  }

  /** Marks the answer as complete; `id`: the server's, or undefined if it does not keep it. */
  end(reason, usage, id) {
    const { element } = this;
    const seconds = (performance.now() - this.#started) / 1000;
    this.tokens = usage?.completion_tokens ?? this.#words.total.tokens;
    const known = this.shares !== null || this.#words.total.tokens > 0;
    element.setAttribute("aria-busy", "false");
    element.querySelector(".shares").hidden = !known;
    element.querySelector(".uncoloured").hidden = !this.text || this.#words.total.tokens > 0;
    const figures = [ENDINGS[reason] ?? reason];
    if (this.tokens) figures.unshift(`${this.tokens} tokens in ${seconds.toFixed(1)} s`);
    if (this.#first) figures.splice(1, 0, `first after ${(this.#first - this.#started).toFixed(0)} ms`);
    element.querySelector(".figures").textContent = figures.join(" · ");
    if (id && this.text && this.#traced.length) offerTrace(element, id, this.#traced, this.#looks);
  }

  /** The names and shares, the largest first. */
  get ranking() {
    const share = this.#shareOf();
    return [...this.#on.keys()].map((n) => [n, share(n)]).sort((a, b) => b[1] - a[1]);
  }

  #shareOf() {
    if (this.shares) return (name) => this.shares[name] ?? 0;
    return (name) => this.#words.total.share(name);
  }

  /** Many tokens may come between two frames. */
  #drawSharesSoon() {
    if (this.#drawn) return;
    this.#drawn = true;
    requestAnimationFrame(() => {
      this.#drawn = false;
      if (this.shares || this.#words.total.tokens) this.#bars.set(this.#shareOf());
    });
  }

  #draw(from) {
    const { list } = this.#words;
    for (let i = from; i < list.length; i++) {
      const { gap, text, mass } = list[i];
      if (!this.#spans[i]) this.#spans[i] = this.#newWord(i);
      const span = this.#spans[i];
      const look = this.#looks.get(mass.strongest) ?? "";
      span.className = `word ${look}`;
      span.textContent = text;
      span.hidden = !text;
      span.style.setProperty("--strength", mass.share(mass.strongest).toFixed(3));
      // Between two words of one source the mark continues.
      const before = span.previousSibling;
      const same = i && text && !gap.includes("\n") && this.#spans[i - 1].className === span.className;
      before.className = `gap ${same ? look : ""}`;
      before.textContent = gap;
      if (same) before.style.setProperty("--strength", mass.share(mass.strongest).toFixed(3));
    }
  }

  #newWord(i) {
    const gap = document.createElement("span");
    const span = document.createElement("span");
    span.tabIndex = i ? -1 : 0;
    this.#box.append(gap, span);
    return span;
  }
}
