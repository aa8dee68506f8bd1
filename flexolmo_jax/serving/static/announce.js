// What a screen reader hears of an answer: whole sentences, not tokens.

const log = document.getElementById("said");
const PAUSE = 5000; // ms between two announcements of one answer

/** Announces a text, after what was said before. */
export function say(text) {
  const line = document.createElement("p");
  line.textContent = text;
  log.append(line);
}

/** Empties the log; nothing is announced. */
export function hush() {
  log.replaceChildren();
}

/** Collects a growing text, and announces it up to the end of a sentence every few seconds. */
export class Reader {
  #waiting = "";
  #last = performance.now();

  add(text) {
    this.#waiting += text;
    const end = this.#waiting.search(/[.!?:;\n]\s*\S*$/) + 1;
    if (!end || performance.now() - this.#last < PAUSE) return;
    say(this.#waiting.slice(0, end));
    this.#waiting = this.#waiting.slice(end);
    this.#last = performance.now();
  }

  /** The text that was not announced yet. */
  rest() {
    return this.#waiting;
  }
}
