// One prompt, answered by the base and by any adapters side by side.

import { address, get, key, path, stream, useGet } from "./api.js";
import { count, duration, fixed } from "./format.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { Check, Choice, Copy, Demo, Field, Input, Problem } from "./parts.js";
import { curl, pythonLines } from "./snippets.js";
import { Tokens, readTokens } from "./tokens.js";

const TOP = 5; // alternatives of a token
const REDRAW = 40; // ms between two pictures of a stream

// What was typed stays while other pages are looked at.
let kept = {
  mode: "raw", prompt: "", system: "", models: null, odds: true, snippet: "curl",
  max_tokens: "64", temperature: "0", top_p: "1", seed: "", stop: "",
};

/** The request for one model: route and body, as sent and as the snippets show it. Raises for a number that is none. */
export function requestOf(form, model) {
  const body = { model };
  if (form.mode === "chat") {
    body.messages = [...(form.system ? [{ role: "system", content: form.system }] : []), { role: "user", content: form.prompt }];
  } else {
    body.prompt = form.prompt;
  }
  for (const [name, title] of [["max_tokens", "Max tokens"], ["temperature", "Temperature"], ["top_p", "Top p"], ["seed", "Seed"]]) {
    if (form[name].trim() === "") continue;
    const number = Number(form[name]);
    if (Number.isNaN(number)) throw new Error(`${title}: expected a number, found "${form[name]}"`);
    body[name] = number;
  }
  if (form.stop) body.stop = [JSON.parse(`"${form.stop.replaceAll('"', '\\"')}"`)];
  return { route: form.mode === "chat" ? "v1/chat/completions" : "v1/completions", body };
}

const streamed = (form, body) => ({
  ...body, stream: true, stream_options: { include_usage: true },
  ...(form.odds ? (form.mode === "chat" ? { logprobs: true, top_logprobs: TOP } : { logprobs: TOP }) : {}),
});

/** Answers by model: `[answers, run, stop, running]`. An answer grows in place; the page is redrawn at intervals. */
function useAnswers() {
  const [, redraw] = useState(0);
  const answers = useRef(new Map());
  const controller = useRef(null);
  const timer = useRef(null);
  const soon = () => {
    timer.current ??= setTimeout(() => { timer.current = null; redraw((turn) => turn + 1); }, REDRAW);
  };
  useEffect(() => () => { controller.current?.abort(); clearTimeout(timer.current); }, []);

  const ask = async (form, model, signal) => {
    const answer = { status: "running", text: "", tokens: [], times: [], asked: performance.now() };
    const decoder = new TextDecoder();
    answers.current.set(model, answer);
    try {
      const { route, body } = requestOf(form, model);
      for await (const chunk of stream("POST", route, streamed(form, body), { signal })) {
        if (chunk.usage) answer.usage = chunk.usage;
        const choice = chunk.choices[0];
        if (!choice) continue;
        const text = choice.text ?? choice.delta?.content ?? "";
        answer.text += text;
        answer.tokens.push(...readTokens(choice, decoder));
        if (text) answer.times.push(performance.now());
        answer.finish = choice.finish_reason ?? answer.finish;
        soon();
      }
      answer.status = "done";
    } catch (error) {
      answer.status = error.name === "AbortError" ? "stopped" : "failed";
      answer.error = error.name === "AbortError" ? null : error;
    }
    soon();
  };
  const run = async (form) => {
    controller.current?.abort();
    const mine = new AbortController();
    controller.current = mine;
    answers.current = new Map();
    await Promise.all(form.models.map((model) => ask(form, model, mine.signal)));
    if (controller.current === mine) controller.current = null;
    redraw((turn) => turn + 1);
  };
  const stop = () => controller.current?.abort();
  return [answers.current, run, stop, controller.current !== null];
}

/** Tokens per second from the request to its last token: what is read in one go leaves no time between the others. */
function speed({ usage, times, asked }) {
  return usage && times.length ? (1000 * usage.completion_tokens) / (times.at(-1) - asked) : null;
}

function Answer({ model, answer, odds }) {
  const title = html`<h2>${model}</h2>`;
  if (!answer) return html`<section class="answer" aria-label=${model}><header>${title}</header><div class="text muted">No answer yet.</div></section>`;
  const rate = speed(answer);
  return html`
    <section class="answer" aria-label=${model}>
      <header>${title}<span class=${`state state-${answer.status === "failed" ? "errored" : answer.status === "done" ? "completed" : answer.status}`}>${answer.status}</span></header>
      ${answer.error ? html`<${Problem} error=${answer.error} />` : null}
      <div class="text" aria-busy=${answer.status === "running"} tabindex="0" role="group" aria-label=${`Answer of ${model}`}>${odds && answer.tokens.length ? html`<${Tokens} tokens=${answer.tokens} label=${model} />` : answer.text}</div>
      <footer>
        <span>${rate === null ? "" : `${fixed(rate, 1)} tokens/s`}</span>
        <span>${answer.times.length ? `first after ${duration((answer.times[0] - answer.asked) / 1000)}` : ""}</span>
        <span>${answer.usage ? `${count(answer.usage.prompt_tokens)} + ${count(answer.usage.completion_tokens)} tokens` : ""}</span>
        <span>${answer.finish ? `ended by ${answer.finish}` : ""}</span>
      </footer>
    </section>`;
}

/** Names that can be asked: the base, and every repository with its aliases and versions. */
function modelNames(base, repos) {
  const names = base ? [base] : [];
  for (const repo of repos) {
    names.push(repo.name, ...(repo.aliases ?? []).map((alias) => `${repo.name}@${alias.name}`));
    names.push(...(repo.versions ?? []).filter((one) => one.state === "ready").map((one) => `${repo.name}/${one.number}`));
  }
  return names;
}

function Picker({ names, chosen, onChosen }) {
  const [typed, setTyped] = useState("");
  const add = (event) => {
    event.preventDefault();
    const name = typed.trim();
    if (name && !chosen.includes(name)) onChosen([...chosen, name]);
    setTyped("");
  };
  return html`
    <form class="row" onSubmit=${add}>
      <${Field} label="Answered by" hint="name, name/3, name/3@step or name@alias">
        ${(id) => html`
          <div class="row">
            <input id=${id} list="models" value=${typed} placeholder="Add an adapter" onInput=${(event) => setTyped(event.currentTarget.value)} />
            <datalist id="models">${names.filter((one) => !chosen.includes(one)).map((one) => html`<option value=${one} />`)}</datalist>
          </div>`}
      <//>
      <button type="submit" disabled=${!typed.trim()}>Add</button>
      <div class="chips">
        ${chosen.map((one) => html`<span class="chip" key=${one}>${one}<button type="button" aria-label=${`Leave out ${one}`} onClick=${() => onChosen(chosen.filter((other) => other !== one))}>×</button></span>`)}
      </div>
    </form>`;
}

/** Puts the prompt template of a version into the prompt, to be filled in. */
function TemplateButton({ models, repos, onText }) {
  const repo = repos.find((one) => models.some((model) => model.split(/[/@]/)[0] === one.name) && one.versions?.some((version) => version.state === "ready"));
  if (!repo) return null;
  const take = async () => {
    const newest = repo.versions.filter((one) => one.state === "ready").sort((a, b) => b.number - a.number)[0];
    const version = await get(path`api/repos/${repo.name}/versions/${newest.number}`);
    const text = version.lock?.template?.kind === "prompt" ? version.lock.template.text : version.recipe?.prompt;
    if (text) onText(text);
  };
  return html`<button type="button" class="small" onClick=${take}>Prompt template of ${repo.name}</button>`;
}

function Snippet({ form, onForm }) {
  let text;
  try {
    const { route, body } = requestOf(form, form.models[0] ?? "");
    const keyed = key.get() !== null;
    text = form.snippet === "curl" ? curl(address(route), body, keyed) : pythonLines(address("").replace(/\/$/, ""), body, keyed);
  } catch (error) {
    return html`<${Problem} error=${error} />`;
  }
  return html`
    <section class="stack" aria-label="The same request elsewhere">
      <div class="row">
        <h2>The same request elsewhere</h2>
        <${Choice} label="Language" value=${form.snippet} options=${[["curl", "curl"], ["python", "Python"]]} onValue=${(snippet) => onForm({ snippet })} />
        <${Copy} text=${text} />
      </div>
      <pre class="code" tabindex="0" data-snippet=${form.snippet}>${text}</pre>
    </section>`;
}

export function Playground({ query }) {
  const info = useGet("api/info");
  const listing = useGet("api/repos?limit=200");
  const [form, setForm] = useState(() => ({ ...kept, ...(query.get("model") ? { models: null } : {}) }));
  const [answers, run, stop, running] = useAnswers();
  const base = info.data?.base.name;
  const repos = listing.data?.items ?? [];
  const change = (fields) => setForm((before) => (kept = { ...before, ...fields }));
  const loaded = listing.data || listing.error;
  useEffect(() => {
    if (form.models !== null || !base || !loaded) return;
    const usable = repos.find((one) => one.versions?.some((version) => version.state === "ready"));
    const adapter = query.get("model") ?? usable?.name;
    change({ models: adapter && adapter !== base ? [base, adapter] : [base] });
  }, [base, loaded]);
  const models = form.models ?? [];
  const go = (event) => {
    event?.preventDefault();
    if (models.length && form.prompt) run({ ...form, models });
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go(event);
  };
  const text = (name) => ({ value: form[name], onValue: (value) => change({ [name]: value }) });
  return html`
    <div class="head"><h1 tabindex="-1">Playground</h1></div>
    <${Problem} error=${info.error ?? listing.error} />
    <div class="split">
      <form class="stack" onSubmit=${go} onKeyDown=${onKeyDown}>
        <div class="row">
          <${Choice} label="Kind of prompt" value=${form.mode} options=${[["raw", "Raw"], ["chat", "Chat"]]} onValue=${(mode) => change({ mode })} />
          <${TemplateButton} models=${models} repos=${repos} onText=${(prompt) => change({ prompt, mode: "raw" })} />
        </div>
        ${form.mode === "chat" ? html`<${Input} label="System" ...${text("system")} />` : null}
        <${Field} label=${form.mode === "chat" ? "User" : "Prompt"}>
          ${(id) => html`<textarea id=${id} rows="7" value=${form.prompt} onInput=${(event) => change({ prompt: event.currentTarget.value })}></textarea>`}
        <//>
        <div class="row">
          <button type="submit" class="primary" disabled=${!models.length || !form.prompt}>Run</button>
          <button type="button" disabled=${!running} onClick=${stop}>Stop</button>
          <span class="muted">Ctrl + Enter runs</span>
        </div>
      </form>
      <div class="stack">
        <div class="fields">
          <${Input} label="Max tokens" inputmode="numeric" ...${text("max_tokens")} />
          <${Input} label="Temperature" inputmode="decimal" ...${text("temperature")} />
          <${Input} label="Top p" inputmode="decimal" ...${text("top_p")} />
          <${Input} label="Seed" inputmode="numeric" ...${text("seed")} />
          <${Input} label="Stop at" placeholder="\\n" ...${text("stop")} />
        </div>
        <${Picker} names=${modelNames(base, repos)} chosen=${models} onChosen=${(chosen) => change({ models: chosen })} />
        <${Check} label="Token probabilities" checked=${form.odds} onValue=${(odds) => change({ odds })} />
      </div>
    </div>
    <div class="columns">
      ${models.map((model) => html`<${Answer} key=${model} model=${model} answer=${answers.get(model)} odds=${form.odds} />`)}
    </div>
    ${listing.data && !repos.length ? html`<section class="empty"><h2>No adapter yet</h2><p>The base answers alone until there is one. <a href="#/runs/new">Train one from your own rows</a>.</p><${Demo} /></section>` : null}
    ${models.length ? html`<${Snippet} form=${{ ...form, models }} onForm=${change} />` : null}`;
}
