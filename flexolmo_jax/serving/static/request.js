// The request of the page in other hands: as curl, and as Python with OpenAI's client.
import { address, key } from "./api.js";

/** Shell commands, one for each body; the key is named, never shown. */
export function asCurl(bodies) {
  return bodies.map(curl).join("\n\n");
}

function curl(body) {
  const auth = key.get() ? ` \\\n  -H "Authorization: Bearer $FLEXOLMO_API_KEY"` : "";
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const type = '-H "Content-Type: application/json"';
  return `curl -N ${address("completions")} \\\n  ${type}${auth} \\\n  -d '${json}'`;
}

/** A Python script that prints the answers, with OpenAI's client. */
export function asPython(bodies) {
  const { model, prompt, max_tokens, temperature, seed } = bodies[0];
  const own = bodies.map(({ experts, expert_mass }) => ({
    ...(experts && { experts }),
    ...(expert_mass && { expert_mass }),
  }));
  const secret = key.get() ? 'os.environ["FLEXOLMO_API_KEY"]' : '"none"';
  return `${key.get() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${python(address("").replace(/\/$/, ""))}, api_key=${secret})
for extra in [${own.map((body) => `\n    ${python(body)},`).join("")}
]:
    stream = client.completions.create(
        model=${python(model)},
        prompt=${python(prompt)},
        max_tokens=${max_tokens},
        temperature=${temperature},
        seed=${seed},
        stream=True,
        extra_body=extra,
    )
    for chunk in stream:
        print("".join(choice.text for choice in chunk.choices), end="", flush=True)
    print()
`;
}

/** A value as Python's literal: texts, and lists and objects of them. */
function python(value) {
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const fields = Object.entries(value).map(([name, x]) => `${JSON.stringify(name)}: ${python(x)}`);
  return `{${fields.join(", ")}}`;
}
