// The curl and Python lines that do what the playground shows.

/** A word of a POSIX shell. */
export const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A Python literal of a JSON value. */
export function python(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one)}`).join(", ")}}`;
  return JSON.stringify(value);
}

export function curl(url, body, keyed) {
  const lines = [`curl ${shell(url)}`, `  -H 'content-type: application/json'`];
  if (keyed) lines.push(`  -H "authorization: Bearer $LORIKEET_API_KEY"`);
  lines.push(`  -d ${shell(JSON.stringify(body))}`);
  return lines.join(" \\\n");
}

export function pythonLines(origin, body, keyed) {
  const { prompt, messages, ...fields } = body;
  const more = Object.entries(fields).map(([name, value]) => `    ${name}=${python(value)},`);
  return [
    ...(keyed ? ["import os", ""] : []),
    "from lorikeet import Client",
    "",
    `client = Client(${python(origin)}${keyed ? `, api_key=os.environ["LORIKEET_API_KEY"]` : ""})`,
    `answer = client.${messages ? "chat" : "complete"}(`,
    `    ${python(messages ?? prompt)},`,
    ...more,
    ")",
    "print(answer.text)",
  ].join("\n");
}
