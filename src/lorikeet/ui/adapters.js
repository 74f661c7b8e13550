// Repositories, their versions, where each comes from, what it scores, what its aliases are, and where it lives now.

import { address, call, key, path, useAction, useGet } from "./api.js";
import { ago, bytes, count, duration, fixed, moment, percent } from "./format.js";
import { html, useState } from "./html.js";
import { Confirm, Copy, Demo, Dialog, Empty, Facts, Input, Interval, Problem, State, Table, Waiting } from "./parts.js";
import { Recipe } from "./run.js";

const PLACES = { device: "on the device", loading: "on its way to the device", host: "in host memory", disk: "compiled, on disk", source: "in the store" };

const newest = (repo) => [...(repo.versions ?? [])].sort((a, b) => b.number - a.number);

function Aliases({ aliases }) {
  return aliases.map((one) => html`<span class="tag accent">@${one.name}${one.shown ?? ""}</span>`);
}

export function Adapters() {
  const [sought, setSought] = useState("");
  const [trail, setTrail] = useState([null]); // cursors of the pages seen
  const after = trail.at(-1);
  const query = new URLSearchParams({ limit: "50", ...(sought ? { contains: sought } : {}), ...(after ? { after } : {}) });
  const { data, error } = useGet(`api/repos?${query}`, 5);
  const items = data?.items ?? [];
  const seek = (text) => {
    setSought(text);
    setTrail([null]);
  };
  const empty = data && !items.length && !sought && trail.length === 1;
  return html`
    <div class="head"><h1 tabindex="-1">Adapters</h1><div class="push"><a class="button primary" href="#/runs/new">Train one</a></div></div>
    <${Problem} error=${error} />
    ${empty ? html`
      <${Empty} title="No repository yet">
        <p>A repository holds the versions of one adapter. <a href="#/runs/new">Train one from your rows</a>, or bring one: <code>lorikeet adapters import NAME FOLDER</code> takes a PEFT folder, a hub id or an S3 address.</p>
        <${Demo} />
      <//>` : html`
      <${Input} label="Name contains" type="search" value=${sought} onValue=${seek} />
      ${!data && !error ? html`<${Waiting} what="repositories" />` : null}
      ${data ? html`
        <${Table} caption="Repositories" rows=${items} rowKey=${(repo) => repo.name} columns=${[
          { title: "Repository", cell: (repo) => html`<a href=${path`#/adapters/${repo.name}`}>${repo.name}</a>` },
          { title: "Description", wide: true, cell: (repo) => repo.description },
          { title: "Versions", number: true, cell: (repo) => count(repo.versions.length) },
          { title: "Newest", cell: (repo) => (newest(repo)[0] ? html`${newest(repo)[0].number} <${State} state=${newest(repo)[0].state} />` : "–") },
          { title: "Aliases", cell: (repo) => html`<${Aliases} aliases=${(repo.aliases ?? []).map((one) => ({ ...one, shown: ` → ${one.number}` }))} />` },
          { title: "Size", number: true, cell: (repo) => bytes(newest(repo)[0]?.bytes) },
          { title: "Changed", number: true, cell: (repo) => ago(repo.changed) },
        ]} />
        <div class="row">
          ${trail.length > 1 ? html`<button type="button" onClick=${() => setTrail(trail.slice(0, -1))}>Before</button>` : null}
          ${data.next ? html`<button type="button" onClick=${() => setTrail([...trail, data.next])}>More</button>` : null}
          ${!items.length ? html`<p class="muted">No name contains "${sought}".</p>` : null}
        </div>` : null}`}`;
}

/** Asks which alias shall be this version, and says what it is now. */
function Promote({ repo, number, onClose }) {
  const [alias, setAlias] = useState("production");
  const current = (repo.aliases ?? []).find((one) => one.name === alias.trim());
  const work = () => call("PUT", path`api/repos/${repo.name}/aliases/${alias.trim()}`, { version: number, expected: current?.number ?? 0 });
  return html`
    <${Confirm} title=${`Promote ${repo.name}/${number}`} action=${`Move ${alias.trim() || "the alias"} to ${number}`} work=${work} onClose=${onClose}>
      <${Input} label="Alias" required value=${alias} onValue=${setAlias} hint="A request for the bare name gets @production." />
      <p role="status">${current ? `${repo.name}@${current.name} is version ${current.number} now; from the next request on it is ${number}. Requests that run go on with the version they began with.` : `${repo.name}@${alias.trim()} is new.`}</p>
    <//>`;
}

function History({ repo, alias, onClose }) {
  const { data, error } = useGet(path`api/repos/${repo.name}/aliases/${alias}/history`);
  return html`
    <${Dialog} title=${`${repo.name}@${alias}`} onClose=${onClose}>
      <${Problem} error=${error} />
      ${data ? html`<${Table} caption="Moves" rows=${data.items} columns=${[
        { title: "When", cell: (move) => moment(move.at) },
        { title: "From", number: true, cell: (move) => move.previous ?? "–" },
        { title: "To", number: true, cell: (move) => move.number ?? "removed" },
        { title: "By", wide: true, cell: (move) => move.by },
      ]} />` : null}
      <div class="row end"><button type="button" onClick=${onClose}>Close</button></div>
    <//>`;
}

/** Queues the judging of a version beside its base, on the test rows of the dataset it was trained on. */
function Judge({ version }) {
  const [judge, busy, error] = useAction(async () => {
    const job = await call("POST", "api/jobs", { kind: "eval", dataset: version.recipe.dataset, adapter: version.reference });
    window.location.hash = path`#/runs/${job.id}`;
  });
  if (!version.recipe?.dataset || version.state !== "ready") return null;
  return html`<div><button type="button" class="small" disabled=${busy} onClick=${judge}>Judge it on ${version.recipe.dataset}</button></div><${Problem} error=${error} />`;
}

function Evaluations({ items }) {
  if (!items.length) return html`<p class="muted">Not judged yet. A dataset with test rows judges it beside the base.</p>`;
  return html`<${Table} caption="Evaluations" rows=${items} columns=${[
    { title: "Task", cell: (one) => one.task },
    { title: "Metric", cell: (one) => one.metric },
    { title: "Score", number: true, cell: (one) => percent(one.score) },
    { title: "95% interval", number: true, cell: (one) => intervalText(one) },
    { title: "0 to 100%", cell: (one) => html`<${Interval} score=${one.score} low=${one.low} high=${one.high} />` },
    { title: "Base", number: true, cell: (one) => percent(one.result?.base) },
    { title: "Rows", number: true, cell: (one) => count(one.n) },
    { title: "When", number: true, cell: (one) => ago(one.created) },
  ]} />`;
}

function intervalText({ low, high }) {
  return low === null || low === undefined ? "–" : `${percent(low)} to ${percent(high)}`;
}

/** The chain from a version to what it was trained on from, the oldest last. */
function Lineage({ version }) {
  const merge = version.recipe?.merge;
  const older = merge ? merge.adapters : version.lineage.map((one) => one.reference);
  const link = (name) => {
    const [repo, number] = name.split("/");
    return html`<a href=${path`#/adapters/${repo}` + `?version=${number?.split("@")[0] ?? ""}`}>${name}</a>`;
  };
  return html`<span>${merge ? `${merge.method} of ` : ""}${older.map((name, i) => html`${i ? (merge ? " + " : " ← ") : ""}${link(name)}`)}${merge ? "" : `${older.length ? " ← " : ""}${version.base ?? "base"}`}</span>`;
}

async function download(version, file) {
  const headers = key.get() ? { authorization: `Bearer ${key.get()}` } : {};
  const reply = await fetch(address(path`api/repos/${version.repository}/versions/${version.number}/files/` + file.split("/").map(encodeURIComponent).join("/")), { headers });
  if (!reply.ok) throw new Error(`the server answered ${reply.status}`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await reply.blob());
  link.download = file.split("/").at(-1);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function Files({ version }) {
  const [take, busy, error] = useAction((file) => download(version, file));
  const files = version.files ?? [];
  if (!files.length) return null;
  return html`
    <details><summary>Files (${bytes(version.bytes)})</summary>
      <${Problem} error=${error} />
      <${Table} caption="Files" rows=${files} columns=${[
        { title: "File", wide: true, cell: (file) => html`<button type="button" class="link" disabled=${busy} onClick=${() => take(file.path)}>${file.path}</button>` },
        { title: "Size", number: true, cell: (file) => bytes(file.bytes) },
        { title: "sha256", cell: (file) => html`<code>${file.sha256.slice(0, 12)}</code>` },
      ]} />
    </details>`;
}

function Version({ repo, number }) {
  const { data, error } = useGet(path`api/repos/${repo.name}/versions/${number}`, 5);
  if (!data) return error ? html`<${Problem} error=${error} />` : html`<${Waiting} what="the version" />`;
  const version = data;
  const name = `${repo.name}/${number}`;
  const metrics = version.metrics ?? {};
  return html`
    <section class="stack" aria-label=${`Version ${number}`}>
      <div class="head"><h2>${name}</h2><${State} state=${version.state} /><${Copy} text=${name} label="Copy the name" /></div>
      ${version.description ? html`<p>${version.description}</p>` : null}
      <${Facts} items=${[
        ["Lives", PLACES[version.where] ?? version.where ?? "–"],
        ["Kind", version.kind ?? "–"], ["Rank", version.rank ?? "–"], ["Size", bytes(version.bytes)],
        ["Held-out loss", fixed(metrics.validation_loss ?? metrics.loss)],
        ["Training", duration(metrics.train_seconds)],
        (version.children ?? []).length > 0 && ["Trained on from it", version.children.map((one) => one.reference).join(", ")],
        (version.checkpoints ?? []).length > 0 && ["Checkpoints", version.checkpoints.map((one) => `@${one.step}`).join(", ")],
        ["Created", moment(version.created)], ["By", version.created_by],
        ["Lineage", html`<${Lineage} version=${version} />`],
        ["Base", version.base ?? "–"],
        version.job_id && ["Run", html`<a href=${path`#/runs/${version.job_id}`}>${version.job_id.slice(0, 8)}</a>`],
        version.data_sha256 && ["Data", html`<code>${version.data_sha256.slice(0, 12)}</code>`],
        version.code_version && ["Made by", version.code_version],
        version.source && ["From", version.source],
      ]} />
      <h3>Evaluations</h3>
      <${Evaluations} items=${version.evaluations} />
      <${Judge} version=${version} />
      ${version.recipe ? html`<details open><summary>Recipe</summary><div class="stack"><${Recipe} recipe=${version.recipe} /></div></details>` : null}
      <${Files} version=${version} />
    </section>`;
}

export function Repository({ name, chosen }) {
  const { data: repo, error, reload } = useGet(path`api/repos/${name}`, 5);
  const [promoting, setPromoting] = useState(null);
  const [removing, setRemoving] = useState(null);
  const [history, setHistory] = useState(null);
  const versions = repo ? newest(repo) : [];
  const number = Number(chosen) || versions[0]?.number;
  const head = html`<div class="head"><h1 tabindex="-1">${name}</h1>${repo ? html`<div class="push"><a class="button" href=${`#/playground?model=${encodeURIComponent(name)}`}>Try it</a></div>` : null}</div>`;
  if (!repo) return html`${head}${error ? html`<${Problem} error=${error} />` : html`<${Waiting} what="the repository" />`}`;
  const aliasesOf = (version) => (repo.aliases ?? []).filter((one) => one.number === version.number);
  const close = (setter) => (done) => { setter(null); if (done) reload(); };
  return html`
    ${head}
    ${repo.description ? html`<p>${repo.description}</p>` : null}
    <${Problem} error=${error} />
    ${(repo.aliases ?? []).length ? html`<p class="row">${repo.aliases.map((one) => html`<span><span class="tag accent">@${one.name} → ${one.number}</span><button type="button" class="link" onClick=${() => setHistory(one.name)}>history of ${one.name}</button></span>`)}</p>` : html`<p class="muted">No alias yet: a request for ${name} gets its newest version. Promote one, and it stays with that until you promote another.</p>`}
    ${versions.length ? html`
      <${Table} caption=${`Versions of ${name}`} rows=${versions} rowKey=${(one) => one.number} rowClass=${(one) => (one.number === number ? "chosen" : "")} columns=${[
        { title: "Version", number: true, cell: (one) => html`<a href=${path`#/adapters/${name}` + `?version=${one.number}`} aria-current=${one.number === number ? "true" : null}>${one.number}</a>` },
        { title: "State", cell: (one) => html`<${State} state=${one.archived ? "archived" : one.state} />` },
        { title: "Aliases", cell: (one) => html`<${Aliases} aliases=${aliasesOf(one)} />` },
        { title: "Lives", cell: (one) => PLACES[one.where] ?? "–" },
        { title: "Kind", cell: (one) => one.kind ?? "–" },
        { title: "Rank", number: true, cell: (one) => one.rank ?? "–" },
        { title: "Held-out loss", number: true, cell: (one) => fixed(one.metrics?.validation_loss ?? one.metrics?.loss) },
        { title: "Size", number: true, cell: (one) => bytes(one.bytes) },
        { title: "Created", number: true, cell: (one) => ago(one.created) },
        { title: "Actions", quiet: true, cell: (one) => html`<button type="button" class="small" disabled=${one.state !== "ready"} onClick=${() => setPromoting(one.number)}>Promote ${one.number}</button> <button type="button" class="small danger" onClick=${() => setRemoving(one.number)}>Delete ${one.number}</button>` },
      ]} />` : html`<${Empty} title="No version yet"><p><a href="#/runs/new">Train the first one</a>.</p><//>`}
    ${number ? html`<${Version} key=${number} repo=${repo} number=${number} />` : null}
    ${promoting !== null ? html`<${Promote} repo=${repo} number=${promoting} onClose=${close(setPromoting)} />` : null}
    ${history !== null ? html`<${History} repo=${repo} alias=${history} onClose=${() => setHistory(null)} />` : null}
    ${removing !== null ? html`
      <${Confirm} title=${`Delete ${name}/${removing}?`} action=${`Delete version ${removing}`} danger work=${() => call("DELETE", path`api/repos/${name}/versions/${removing}`)} onClose=${close(setRemoving)}>
        <p>Requests for it are refused from then on. Its number is not used again.</p>
      <//>` : null}`;
}
