// A run from an uploaded file: what the model will see and learn, and what is wrong with it, before anything starts.

import { call, get, path, useAction, useGet } from "./api.js";
import { bytes, count, percent, plural } from "./format.js";
import { html, useEffect, useRef, useState } from "./html.js";
import { Empty, Demo, Field, Input, Problem, Table } from "./parts.js";

const SETTINGS = [
  ["rank", "Rank", "16"], ["alpha", "Alpha", "32"], ["epochs", "Epochs", "3"], ["learning_rate", "Learning rate", "0.002"],
  ["dropout", "Dropout", "0.1"], ["batch_rows", "Rows a step", "16"], ["validation", "Held-out share", "0.05"],
  ["patience", "Patience", ""], ["seed", "Seed", "0"],
];
const LABELS = ["label", "completion", "answer", "output", "target", "response", "summary", "query", "intent"];
const SKIPPED = ["id", "split", "template", "index"];

/** A first guess of the templates: the column that looks like an answer is learned, the others are shown. */
export function guess(columns) {
  const names = Object.keys(columns).filter((name) => !SKIPPED.includes(name));
  const answer = names.find((name) => LABELS.includes(name.toLowerCase())) ?? names.at(-1) ?? "";
  const title = (name) => name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");
  const shown = names.filter((name) => name !== answer);
  const structured = columns[answer] && !/str|text|label/i.test(String(columns[answer]));
  return {
    prompt: [...shown.map((name) => `${title(name)}: {${name}}`), `${title(answer)}:`].join("\n"),
    completion: structured ? ` {${answer} | json}` : ` {${answer}}`,
  };
}

function Upload({ onDone }) {
  const [name, setName] = useState("");
  const [test, setTest] = useState("0.1");
  const file = useRef(null);
  const [send, busy, error] = useAction(async () => {
    const form = new FormData();
    form.append("name", name.trim());
    if (Number(test) > 0) form.append("shares", JSON.stringify({ test: Number(test) }));
    form.append("file", file.current.files[0]);
    onDone(await call("POST", "api/datasets", form));
  });
  const choose = () => {
    const found = file.current.files[0];
    if (found && !name) setName(found.name.replace(/\.[^.]*$/, "").replaceAll(/[^A-Za-z0-9._-]+/g, "-"));
  };
  return html`
    <form class="stack" onSubmit=${(event) => { event.preventDefault(); send(); }}>
      <${Field} label="A file of rows" hint="JSON lines, CSV, TSV or Parquet">
        ${(id) => html`<input id=${id} type="file" ref=${file} required accept=".jsonl,.ndjson,.csv,.tsv,.parquet" onChange=${choose} />`}
      <//>
      <div class="halves">
        <${Input} label="Name of the dataset" required value=${name} onValue=${setName} />
        <${Input} label="Share kept to judge by" inputmode="decimal" value=${test} onValue=${setTest} />
      </div>
      <${Problem} error=${error} />
      <div><button type="submit" disabled=${busy}>${busy ? "Uploading …" : "Upload"}</button></div>
    </form>`;
}

function Rows({ dataset }) {
  const rows = dataset.first_rows ?? [];
  const columns = Object.entries(dataset.columns ?? {});
  const text = (found) => (typeof found === "object" ? JSON.stringify(found) : String(found ?? ""));
  return html`
    <p class="muted">${Object.entries(dataset.splits).map(([name, split]) => `${name} ${plural(split.rows, "row")}`).join(", ")}, ${bytes(dataset.bytes)}; columns ${columns.map(([name, type]) => `${name} (${type})`).join(", ")}</p>
    ${rows.length ? html`<details><summary>First rows</summary><${Table} caption=${`First rows of ${dataset.name}`} rows=${rows.slice(0, 5)} columns=${columns.map(([name]) => ({ title: name, wide: true, cell: (row) => text(row[name]) }))} /></details>` : null}`;
}

function Audit({ preview }) {
  const findings = preview.audit ?? [];
  const tokens = preview.tokens ?? {};
  return html`
    <section class="stack" aria-label="Audit">
      <h3>Audit of the data</h3>
      ${findings.map((one) => html`<p class=${one.level === "error" ? "problem" : "note"}><strong>${one.level}</strong> ${one.message}</p>`)}
      ${findings.length ? null : html`<p class="fine">Nothing is wrong with it.</p>`}
      <p class="muted">${count(tokens.train_rows)} rows to train on, ${count(tokens.validation_rows)} held out, ${count(tokens.test_rows)} to judge by; ${count(tokens.tokens)} tokens, ${percent(tokens.learned_tokens / Math.max(tokens.tokens, 1), 0)} of them learned, at most ${count(tokens.percentiles?.["100"])} in a row${preview.rows_read < preview.rows_all ? ` (of the first ${count(preview.rows_read)} rows)` : ""}; about ${count(preview.steps)} steps.</p>
      <${Labels} labels=${preview.labels} />
    </section>`;
}

/** How often each completion occurs, where they repeat. */
function Labels({ labels }) {
  const entries = Object.entries(labels ?? {});
  if (!entries.length) return null;
  return html`<details><summary>${plural(entries.length, "completion")} that repeat</summary><p class="chips">${entries.slice(0, 60).map(([name, n]) => html`<span class="tag">${name} ${count(n)}</span>`)}</p></details>`;
}

/** Neighbours that are both learned, or both masked, as one. */
function merged(pieces) {
  const found = [];
  for (const piece of pieces) {
    if (found.length && found.at(-1).learned === piece.learned) found.at(-1).text += piece.text;
    else found.push({ ...piece });
  }
  return found;
}

function Preview({ preview }) {
  return html`
    <section class="stack" aria-label="Rendered rows">
      <h3>Rows as the model sees them</h3>
      <p class="muted">Grey text is read, and masked in the loss; <span class="learned">underlined</span> text is learned.</p>
      ${preview.rows.slice(0, 4).map((row, i) => html`
        <div class="rendered" key=${i} tabindex="0" role="group" aria-label=${`Row ${i + 1}`}>
          ${merged(row.pieces).map((piece) => html`<span class=${piece.learned ? "learned" : "masked"}>${piece.text}</span>`)}
        </div>`)}
    </section>`;
}

/** The preview of what is typed, asked for once typing has paused. */
function usePreview(name, recipe) {
  const [state, setState] = useState({ preview: null, error: null, of: null });
  useEffect(() => {
    if (!name || !recipe) return undefined;
    const controller = new AbortController();
    const timer = setTimeout(async () => {
      try {
        const preview = await call("POST", path`api/datasets/${name}/preview`, JSON.parse(recipe), { signal: controller.signal });
        setState({ preview, error: null, of: recipe });
      } catch (error) {
        if (error.name !== "AbortError") setState({ preview: null, error, of: recipe });
      }
    }, 350);
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [name, recipe]);
  return { ...state, busy: state.of !== recipe };
}

/** The fields of the form as a job's recipe. Raises for a number that is none. */
function recipeOf(form, dataset) {
  const recipe = { prompt: form.prompt, completion: form.completion };
  for (const [name, title] of SETTINGS) {
    if (form[name].trim() === "" || (name === "validation" && dataset.splits?.validation)) continue;
    const number = Number(form[name]);
    if (Number.isNaN(number)) throw new Error(`${title}: expected a number, found "${form[name]}"`);
    if (name === "patience") recipe.early_stopping = { metric: "loss", patience: number };
    else recipe[name] = number;
  }
  return recipe;
}

export function NewRun({ query }) {
  const datasets = useGet("api/datasets?limit=200");
  const [dataset, setDataset] = useState(null);
  const [form, setForm] = useState({ repo: "", description: "", prompt: "", completion: "", ...Object.fromEntries(SETTINGS.map(([name, , first]) => [name, first])) });
  const change = (fields) => setForm((before) => ({ ...before, ...fields }));
  const text = (name) => ({ value: form[name], onValue: (value) => change({ [name]: value }) });

  const [take, , refused] = useAction(async (name, templates) => {
    const found = await get(path`api/datasets/${name}`);
    setDataset(found);
    change({ ...guess(found.columns ?? {}), ...(form.repo ? {} : { repo: name }), ...templates });
  });
  const [likeError, setLikeError] = useState(null);
  useEffect(() => {
    const like = query.get("like");
    if (query.get("dataset")) take(query.get("dataset"));
    if (!like) return;
    get(path`api/jobs/${like}`).then((job) => {
      const recipe = job.recipe ?? {};
      const known = Object.fromEntries(SETTINGS.filter(([name]) => typeof recipe[name] === "number").map(([name]) => [name, String(recipe[name])]));
      const patience = recipe.early_stopping ? { patience: String(recipe.early_stopping.patience) } : {};
      take(job.dataset, { ...known, ...patience, ...(recipe.prompt ? { prompt: recipe.prompt, completion: recipe.completion } : {}), repo: job.repo });
    }).catch(setLikeError);
  }, []);

  let recipe = null;
  let wrong = null;
  try {
    recipe = dataset && form.prompt && form.completion ? JSON.stringify(recipeOf(form, dataset)) : null;
  } catch (error) {
    wrong = error;
  }
  const { preview, error: previewError, busy: looking } = usePreview(dataset?.name, recipe);
  const broken = (preview?.audit ?? []).some((one) => one.level === "error");
  const [start, busy, error] = useAction(async () => {
    const job = await call("POST", "api/jobs", { kind: "train", repo: form.repo.trim(), create_repo: true, dataset: dataset.name, recipe: JSON.parse(recipe), description: form.description });
    window.location.hash = path`#/runs/${job.id}`;
  });
  const ready = dataset && recipe && preview && !broken && !looking && form.repo.trim();
  return html`
    <div class="head"><h1 tabindex="-1">New run</h1></div>
    <${Problem} error=${datasets.error ?? likeError} />
    <h2>1. Rows to learn from</h2>
    <div class="halves">
      <${Upload} onDone=${(made) => { datasets.reload(); take(made.name); }} />
      <div class="stack">
        <${Field} label="Or a dataset that is here">
          ${(id) => html`
            <select id=${id} value=${dataset?.name ?? ""} onChange=${(event) => event.currentTarget.value && take(event.currentTarget.value)}>
              <option value="">${datasets.data?.items.length ? "choose" : "there is none yet"}</option>
              ${(datasets.data?.items ?? []).map((one) => html`<option value=${one.name}>${one.name}</option>`)}
            </select>`}
        <//>
        <${Problem} error=${refused} />
        ${dataset ? html`<${Rows} dataset=${dataset} />` : null}
      </div>
    </div>
    ${!dataset && datasets.data && !datasets.data.items.length ? html`<${Empty} title="No rows at hand?"><${Demo} /><//>` : null}
    ${dataset ? html`
      <h2>2. What the model sees, and what it learns</h2>
      <div class="halves">
        <div class="stack">
          <${Field} label="Prompt" hint="Columns in braces; {column | json} writes one as JSON.">
            ${(id) => html`<textarea id=${id} rows="5" value=${form.prompt} onInput=${(event) => change({ prompt: event.currentTarget.value })}></textarea>`}
          <//>
          <${Field} label="Completion" hint="This alone is learned. Begin it with a space where words are apart.">
            ${(id) => html`<textarea id=${id} rows="2" value=${form.completion} onInput=${(event) => change({ completion: event.currentTarget.value })}></textarea>`}
          <//>
          <${Problem} error=${previewError} />
          ${preview ? html`<${Audit} preview=${preview} />` : html`<p class="muted" role="status">${looking ? "Looking at the rows …" : ""}</p>`}
        </div>
        ${preview ? html`<${Preview} preview=${preview} />` : null}
      </div>
      <h2>3. The adapter</h2>
      <form class="stack" onSubmit=${(event) => { event.preventDefault(); start(); }}>
        <div class="halves">
          <${Input} label="Repository" required hint="A new version is added where it is there already." ...${text("repo")} />
          <${Input} label="Description" ...${text("description")} />
        </div>
        <div class="fields">${SETTINGS.map(([name, title]) => html`<${Input} label=${title} inputmode="decimal" ...${text(name)} />`)}</div>
        <${Problem} error=${wrong ?? error} />
        <div class="row"><button type="submit" class="primary" disabled=${!ready || busy}>Start the run</button>
        ${broken ? html`<span class="muted">The audit has errors: nothing can start before they are gone.</span>` : null}</div>
      </form>` : null}`;
}
