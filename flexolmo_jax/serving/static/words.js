// Tokens become words: the text between spaces, with the weights of the tokens that it is made of.

// Scripts without spaces between words: there, each character is a word.
const UNSPACED = /\p{Script=Han}|\p{Script=Hiragana}|\p{Script=Katakana}|\p{Script=Thai}/u;

/** A sum of weights per source, and how many tokens are in it. */
export class Mass {
  sums = new Map();
  tokens = 0;

  add(mass, share = 1) {
    for (const [name, weight] of Object.entries(mass)) {
      this.sums.set(name, (this.sums.get(name) ?? 0) + share * weight);
    }
    this.tokens += share;
  }

  /** The mean weight of a source: its share. */
  share(name) {
    return this.tokens ? (this.sums.get(name) ?? 0) / this.tokens : 0;
  }

  /** The source with the largest share, or undefined. */
  get strongest() {
    let best;
    for (const name of this.sums.keys()) {
      if (best === undefined || this.share(name) > this.share(best)) best = name;
    }
    return best;
  }
}

/**
 * The words of a growing answer.
 *
 * A token counts for each word that it reaches into, by its share of the token's characters, spaces
 * left out. A token of spaces counts for the whole answer and for no word. A token without text is
 * the beginning of a character, so it counts for the word in which the character appears.
 */
export class Words {
  list = []; // {gap, text, mass}: the spaces before the word, the word, its weights
  total = new Mass();
  #pending = [];

  /** Adds one token. */
  add(text, mass) {
    this.total.add(mass);
    const length = text.replace(/\s+/g, "").length;
    if (!text) this.#pending.push(mass);
    for (const piece of text.match(/\s+|\S+/g) ?? []) {
      if (/^\s/.test(piece)) {
        this.#space(piece);
      } else {
        for (const part of split(piece)) this.#write(part, mass, part.length / length);
      }
    }
  }

  #space(gap) {
    const last = this.list.at(-1);
    if (last && !last.text) last.gap += gap;
    else this.list.push({ gap, text: "", mass: new Mass() });
  }

  #write(text, mass, share) {
    const last = this.list.at(-1);
    const joins = last && !(last.text && (UNSPACED.test(text) || UNSPACED.test(last.text)));
    if (!joins) this.list.push({ gap: "", text: "", mass: new Mass() });
    const word = this.list.at(-1);
    word.text += text;
    word.mass.add(mass, share);
    for (const before of this.#pending.splice(0)) word.mass.add(before);
  }
}

function split(piece) {
  if (!UNSPACED.test(piece)) return [piece];
  return piece.match(new RegExp(`${UNSPACED.source}|(?:(?!${UNSPACED.source}).)+`, "gu"));
}
