// The HTTP API: calls, errors, streams, and hooks that keep what they show fresh.

import { useCallback, useEffect, useRef, useState } from "./html.js";

const STORED = "lorikeet.key";
export const NEEDS_KEY = "lorikeet:needs-key";

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? localStorage.getItem(STORED),
  set(value, keep) {
    key.clear();
    (keep ? localStorage : sessionStorage).setItem(STORED, value);
  },
  clear() {
    sessionStorage.removeItem(STORED);
    localStorage.removeItem(STORED);
  },
};

export class ApiError extends Error {
  constructor(message, { status = 0, code = "", hint = "", param = "" } = {}) {
    super(message);
    Object.assign(this, { status, code, hint, param });
  }
}

/** A path whose parts are escaped: path`api/repos/${name}`. */
export function path(strings, ...values) {
  return strings.reduce((all, part, i) => all + encodeURIComponent(values[i - 1]) + part);
}

/** The address of a route, also where the server stands below a prefix. */
export const address = (route) => new URL(route, document.baseURI).href;

async function request(method, route, body, { signal, accept = "application/json" } = {}) {
  const headers = { accept };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const form = body instanceof FormData;
  if (body !== undefined && !form) headers["content-type"] = "application/json";
  let reply;
  try {
    reply = await fetch(address(route), { method, headers, signal, body: form || body === undefined ? body : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server does not answer", { hint: "is it still running?" });
  }
  if (!reply.ok) throw await failure(reply);
  return reply;
}

async function failure(reply) {
  let found = {};
  try {
    found = (await reply.json()).error ?? {};
  } catch {
    // not JSON: the status says what there is to say
  }
  if (reply.status === 401) window.dispatchEvent(new Event(NEEDS_KEY));
  return asError(found, reply.status, `${reply.status} ${reply.statusText}`);
}

function asError(found, status, otherwise) {
  if (typeof found === "string") return new ApiError(found, { status });
  return new ApiError(found.message ?? otherwise, { ...found, status });
}

export async function call(method, route, body, options) {
  const reply = await request(method, route, body, options);
  return reply.status === 204 ? null : (await reply.text().then((text) => (text ? JSON.parse(text) : null)));
}

export const get = (route, options) => call("GET", route, undefined, options);

/** All pages of a list, up to `most` items. */
export async function all(route, most = 1000) {
  const items = [];
  let after = null;
  do {
    const joint = route.includes("?") ? "&" : "?";
    const page = await get(after === null ? route : `${route}${joint}after=${encodeURIComponent(after)}`);
    items.push(...page.items);
    after = page.next;
  } while (after !== null && after !== undefined && items.length < most);
  return items;
}

/** The JSON of every server-sent event; an error in the stream is thrown. EventSource could not send a key. */
export async function* stream(method, route, body, { signal } = {}) {
  const reply = await request(method, route, body, { signal, accept: "text/event-stream" });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
        if (!data || data === "[DONE]") continue;
        const found = JSON.parse(data);
        if (found.error && (found.type ?? "error") === "error") throw asError(found.error, 200, "the stream ended with an error");
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** `{data, error, reload}` of a GET, asked again every `every` seconds while the page is seen. null asks for nothing. */
export function useGet(route, every = 0) {
  const [state, setState] = useState({ route: null, data: null, error: null });
  const [turn, setTurn] = useState(0);
  const reload = useCallback(() => setTurn((before) => before + 1), []);
  useEffect(() => {
    if (route === null) return undefined;
    const controller = new AbortController();
    let timer = null;
    const ask = async () => {
      if (!document.hidden) {
        try {
          setState({ route, data: await get(route, { signal: controller.signal }), error: null });
        } catch (error) {
          if (error.name === "AbortError") return;
          setState((before) => ({ route, data: before.route === route ? before.data : null, error }));
        }
      }
      if (every && !controller.signal.aborted) timer = setTimeout(ask, 1000 * every);
    };
    ask();
    return () => {
      controller.abort();
      clearTimeout(timer);
    };
  }, [route, every, turn]);
  const current = state.route === route ? state : { data: null, error: null };
  return { data: current.data, error: current.error, reload };
}

/** An action of a button: `[run, busy, error]`. One at a time. */
export function useAction(work) {
  const [state, setState] = useState({ busy: false, error: null });
  const busy = useRef(false);
  const run = async (...values) => {
    if (busy.current) return undefined;
    busy.current = true;
    setState({ busy: true, error: null });
    try {
      const result = await work(...values);
      setState({ busy: false, error: null });
      return result;
    } catch (error) {
      setState({ busy: false, error });
      return undefined;
    } finally {
      busy.current = false;
    }
  };
  return [run, state.busy, state.error];
}
