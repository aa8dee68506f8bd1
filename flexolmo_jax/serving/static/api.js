// The server's API: the list of models, and completions as a stream.
import { readEvents } from "./sse.js";

const KEY = "flexolmo.key";

/** The address of a path of the API; relative, so that the page also works below a proxy's prefix. */
export const address = (path) => new URL(`v1/${path}`, document.baseURI).href;

/** The API key of this tab: sessionStorage only. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What the server, or the network, answered instead of a result. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

/** The models that the key may use, in the server's order. */
export async function readModels() {
  const body = parse(await (await call("models", {})).text());
  if (!Array.isArray(body?.data)) throw new ApiError("The server sent no list of models.");
  return body.data;
}

/** Yields the chunks of a completion: objects as OpenAI's, with `token_mass` and `expert_mass`. */
export async function* complete(request, signal) {
  const response = await call("completions", {
    method: "POST",
    body: JSON.stringify(request),
    signal,
  });
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (!chunk) throw new ApiError(`The server sent an event that is not JSON: ${data.slice(0, 80)}`);
    if (chunk.error) throw new ApiError(chunk.error.message, chunk.error);
    yield chunk;
  }
  throw new ApiError("The connection ended before the answer did.");
}

/** Where the words of an answer stand in owners' documents; `id`: of the answer's chunks. */
export async function readTrace(id) {
  const body = parse(await (await call("trace", { method: "POST", body: JSON.stringify({ id }) })).text());
  if (!Array.isArray(body?.spans)) throw new ApiError("The server sent no trace.");
  return body;
}

async function call(path, options) {
  const headers = { "Content-Type": "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (response.ok) return response;
  throw errorOf(response, parse(await response.text()));
}

function errorOf(response, body) {
  const { status, statusText } = response;
  const message = body?.error?.message ?? `The server answered ${status} ${statusText}`.trim();
  const wait = response.headers.get("Retry-After");
  const again = /^\d+$/.test(wait ?? "") ? ` Try again in ${wait} s.` : "";
  return new ApiError(message + again, { ...body?.error, status });
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
