// The page: what is asked, which sources may answer, and the answers as they arrive.
import { Reader, hush, say } from "./announce.js";
import { Answer } from "./answer.js";
import { complete, key, readModels } from "./api.js";
import { copies } from "./copy.js";
import { asCurl, asPython } from "./request.js";
import { percent } from "./shares.js";
import { Sources } from "./sources.js";
import { hideTip } from "./tip.js";

const $ = (id) => document.getElementById(id);
const DETAILS = ["token", "request", "none"]; // what a key may see of the sources, the most first
const sources = new Sources($("sources"), showForm);
const numbers = ["temperature", "max-tokens", "seed"].map($);

let models = [];
let detail = 0; // of DETAILS: what this key may see
let running = null; // an AbortController while answers are being written

const chosen = () => models.find(({ id }) => id === $("model").value) ?? models[0];

// What is asked

/** The part of a request that asks for the sources' shares. */
const asking = () => (DETAILS[detail] === "none" ? {} : { expert_mass: DETAILS[detail] });

/** The bodies of the requests: one, or two side by side. */
function requests() {
  const [sets, other] = [[sources.off], $("compare").value];
  if (other) sets.push(sources.names.filter((n) => sources.off.includes(n) || n === other));
  return sets.map((off) => ({
    model: chosen()?.id ?? "",
    prompt: $("prompt").value,
    max_tokens: $("max-tokens").valueAsNumber,
    temperature: $("temperature").valueAsNumber,
    seed: $("seed").valueAsNumber,
    ...(off.length && { experts: { without: off } }),
    ...asking(),
  }));
}

/** What an answer is called: by the model's profile, if it is one, and by the sources that are off. */
function titleOf(off) {
  const profile = chosen().parent ? chosen().id : "";
  if (!off.length) return profile || "All sources";
  return `${profile ? `${profile}, without` : "Without"} ${off.join(", ")}`;
}

/** Shows what follows from the form: the choices side by side, the sampling, the request. */
function showForm() {
  const names = ["", ...sources.optional];
  offer($("compare"), names, (name) => (name ? `with and without ${name}` : "one answer"));
  const [temperature, tokens, seed] = numbers.map(({ value }) => value || "?");
  $("sampling").textContent = `temperature ${temperature} · ${tokens} tokens · seed ${seed}`;
  const language = document.querySelector("[name=language]:checked").value;
  const bodies = requests().map((body) => ({ ...body, stream: true }));
  $("request").textContent = language === "curl" ? asCurl(bodies) : asPython(bodies);
}

/** Offers values in a <select>, which keeps its value where it can; else it has the first. */
function offer(select, values, text = (value) => value) {
  if (values.join("\n") === [...select.options].map(({ value }) => value).join("\n")) return;
  const before = select.value;
  select.replaceChildren(...values.map((value) => new Option(text(value), value)));
  select.value = values.includes(before) ? before : values[0];
}

/** The first field whose value cannot be sent, and why; or null. */
function mistake() {
  if (!models.length) return [$("prompt"), "There is no model to ask."];
  if (!$("prompt").value) return [$("prompt"), "Write a prompt first."];
  const wrong = numbers.find((field) => !field.checkValidity());
  return wrong && [wrong, `${wrong.labels[0].textContent}: ${wrong.validationMessage}`];
}

// The answers

async function run() {
  if (running) return;
  showError("");
  for (const field of [...numbers, $("prompt")]) field.removeAttribute("aria-invalid");
  const found = mistake();
  if (found) return refuse(...found);
  const [bodies, controller] = [requests(), new AbortController()];
  const answers = bodies.map(({ prompt, experts }) => {
    const off = experts?.without ?? [];
    return new Answer(titleOf(off), prompt, sources, off, chosen().traces ?? []);
  });
  $("empty").hidden = true;
  $("difference").hidden = true;
  hideTip();
  $("answers").replaceChildren(...answers.map(({ element }) => element));
  showRunning(controller);
  bringIntoView($("answers"));
  hush();
  say("Writing.");
  const beside = answers.length > 1;
  await Promise.all(answers.map((answer, i) => write(answer, bodies[i], controller.signal, beside)));
  showRunning(null);
  if (beside) showDifference(...answers.map(({ text }) => text));
}

/** Writes one answer; an error ends it and is shown. */
async function write(answer, body, signal, beside) {
  const reader = new Reader();
  let [reason, usage, id] = ["stop", null];
  try {
    for await (const chunk of stream(body, signal)) {
      for (const choice of chunk.choices) {
        answer.add(choice);
        reason = choice.finish_reason ?? reason;
        if (!beside) reader.add(choice.text);
      }
      [usage, id] = [chunk.usage ?? usage, chunk.id];
    }
  } catch (error) {
    reason = error.name === "AbortError" ? "stopped" : "failed";
    id = undefined; // the server keeps no unfinished answer
    if (reason === "failed") await explain(error);
  }
  answer.end(reason, usage, id);
  const [first] = answer.ranking;
  const most = first?.[1] ? ` Mostly ${first[0]}, ${percent(first[1])}.` : "";
  const rest = beside ? `${answer.title}: ${answer.text}` : reader.rest();
  say(reason === "failed" ? rest : `${rest} Answer complete.${most}`);
  if (reason === "expert_withdrawn") await refresh();
}

/** The chunks of a completion, with as much about the sources as the key's policy allows. */
async function* stream(body, signal) {
  for (;;) {
    const used = detail;
    const { expert_mass: _, ...rest } = body;
    const request = { ...rest, ...asking() };
    try {
      yield* complete({ ...request, stream: true, stream_options: { include_usage: true } }, signal);
      return;
    } catch (error) {
      const forbidden = error.status === 403 && error.param === "expert_mass";
      if (!forbidden || DETAILS[used] === "none") throw error;
      detail = Math.max(detail, used + 1);
      showForm();
    }
  }
}

function showDifference(one, other) {
  const [a, b] = [one, other].map((text) => text.match(/\s*\S+/g) ?? []);
  const first = a.findIndex((word, i) => word !== b[i]);
  const count = first < 0 ? a.length : first;
  let text = "The two answers differ from the first word on.";
  if (one === other) text = "The two answers are the same.";
  else if (count) {
    const last = a.slice(Math.max(0, count - 4), count).join("").trim();
    text = `The two answers are the same for ${count} ${count > 1 ? "words" : "word"}, up to “${last}”.`;
  }
  $("difference").textContent = text;
  $("difference").hidden = false;
  say(text);
}

function showRunning(controller) {
  const focused = [$("generate"), $("stop")].includes(document.activeElement);
  running = controller;
  $("generate").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  if (focused) (controller ? $("stop") : $("generate")).focus();
}

function bringIntoView(element) {
  if (element.getBoundingClientRect().top < 0.7 * innerHeight) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block: "center", behavior: calm ? "instant" : "smooth" });
}

// Errors, and the list of models

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function refuse(field, text) {
  field.closest("details")?.setAttribute("open", "");
  field.setAttribute("aria-invalid", "true");
  field.focus();
  showError(text);
}

/** Shows an error; asks for a key where one is missing; a list of models that is old is read again. */
async function explain(error) {
  if ([404, 410].includes(error.status)) await refresh();
  showError(error.message);
  if (error.status === 401) askForKey();
}

function askForKey() {
  $("key-form").hidden = false;
  $("key").focus();
}

/** Reads the list of models; says whether the server gave it. */
async function refresh() {
  try {
    const found = await readModels();
    const changed = JSON.stringify(found) !== JSON.stringify(models);
    models = found;
    if (changed) showModels();
    return true;
  } catch (error) {
    models = [];
    showModels();
    await explain(error);
    return false;
  }
}

function showModels() {
  const [main] = models.filter(({ parent }) => !parent);
  offer($("model"), [...new Set([main, ...models])].filter(Boolean).map(({ id }) => id));
  $("model-field").hidden = models.length < 2;
  $("forget").hidden = !key.get();
  showSources();
}

function showSources() {
  const model = chosen();
  $("sources-note").hidden = Boolean(model);
  $("sources-note").textContent = "No model to show.";
  if (model) {
    detail = Math.max(0, DETAILS.indexOf(model.expert_mass));
    sources.show(model, models.find(({ id }) => id === model.parent));
    limitTokens(model.max_length);
  } else {
    sources.clear();
  }
  showForm();
}

/** A small model has no room for the usual number of tokens; a number that was typed stays. */
function limitTokens(length) {
  const field = $("max-tokens");
  field.max = length;
  if (field.value !== field.defaultValue) return;
  field.defaultValue = Math.min(Number(field.defaultValue), Math.floor(length / 2));
}

/** Another key may see other things: nothing of before stays on the page. */
async function changeKey() {
  running?.abort();
  models = [];
  showModels();
  $("answers").replaceChildren();
  $("difference").hidden = true;
  $("empty").hidden = false;
  hideTip();
  hush();
  showError("");
  if (await refresh()) {
    $("key-form").hidden = true;
    $("prompt").focus();
  }
}

// Events

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  run();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !hideTip()) running?.abort();
});
$("form").addEventListener("input", showForm);
$("model").addEventListener("change", showSources);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value);
  $("key").value = "";
  changeKey();
});
$("forget").addEventListener("click", () => {
  key.forget();
  changeKey();
});
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && models.length && !running) refresh();
});
copies($("copy"), () => $("request").textContent);
refresh();
