// The pieces that pages are made of: tables, fields, dialogs, notes, bars with intervals.

import { call, path, useAction, useGet } from "./api.js";
import { percent } from "./format.js";
import { html, useEffect, useId, useLayoutEffect, useRef, useState } from "./html.js";

/** `columns`: {title, cell(row), number?, wide?, quiet? (its title is for screen readers alone)}. Scrolls sideways where there is no room. */
export function Table({ caption, columns, rows, rowKey = (row, i) => i, rowClass = () => "" }) {
  return html`
    <div class="scroll" tabindex="0" role="group" aria-label=${caption}>
      <table>
        <caption class="hidden">${caption}</caption>
        <thead>
          <tr>${columns.map((one) => html`<th scope="col" class=${one.number ? "number" : ""}>${one.quiet ? html`<span class="hidden">${one.title}</span>` : one.title}</th>`)}</tr>
        </thead>
        <tbody>
          ${rows.map((row, i) => html`
            <tr key=${rowKey(row, i)} class=${rowClass(row)}>
              ${columns.map((one) => html`<td class=${`${one.number ? "number" : ""} ${one.wide ? "wide" : ""}`}>${one.cell(row)}</td>`)}
            </tr>`)}
        </tbody>
      </table>
    </div>`;
}

export function Problem({ error }) {
  if (!error) return null;
  return html`<p class="problem" role="alert"><strong>${error.message}</strong>${error.hint ? html` <span>${error.hint}</span>` : null}</p>`;
}

export function Waiting({ what }) {
  return html`<p class="muted" role="status">Loading ${what} …</p>`;
}

export function Empty({ title, children }) {
  return html`<section class="empty"><h2>${title}</h2>${children}</section>`;
}

export function State({ state }) {
  return html`<span class=${`state state-${state}`}>${state}</span>`;
}

/** A label with its control; `children` is a function that gets the id. */
export function Field({ label, hint, children, class: extra = "" }) {
  const id = useId();
  return html`
    <div class=${`field ${extra}`}>
      <label for=${id}>${label}</label>
      ${children(id)}
      ${hint ? html`<p class="hint">${hint}</p>` : null}
    </div>`;
}

export function Input({ label, hint, value, onValue, class: extra, ...more }) {
  return html`
    <${Field} label=${label} hint=${hint} class=${extra}>
      ${(id) => html`<input id=${id} value=${value} onInput=${(event) => onValue(event.currentTarget.value)} ...${more} />`}
    <//>`;
}

/** One of many. `options`: [value, label][]. */
export function Select({ label, hint, options, value, onValue, class: extra }) {
  return html`
    <${Field} label=${label} hint=${hint} class=${extra}>
      ${(id) => html`<select id=${id} value=${value} onChange=${(event) => onValue(event.currentTarget.value)}>${options.map(([one, title]) => html`<option value=${one} selected=${one === value}>${title}</option>`)}</select>`}
    <//>`;
}

/** One of a few: radio buttons that look like one control. `options`: [value, label][]. */
export function Choice({ label, options, value, onValue }) {
  const name = useId();
  return html`
    <fieldset class="choice">
      <legend class="hidden">${label}</legend>
      ${options.map(([one, title]) => html`
        <label><input type="radio" name=${name} value=${one} checked=${one === value} onChange=${() => onValue(one)} /><span>${title}</span></label>`)}
    </fieldset>`;
}

export function Check({ label, checked, onValue, ...more }) {
  return html`<label class="check"><input type="checkbox" checked=${checked} onChange=${(event) => onValue(event.currentTarget.checked)} ...${more} /><span>${label}</span></label>`;
}

/** Pairs of a name and a value. */
export function Facts({ items, class: extra = "" }) {
  return html`<dl class=${`facts ${extra}`}>${items.filter(Boolean).map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

/** A modal dialog: the browser keeps the focus inside and closes it with Escape. */
export function Dialog({ title, onClose, children }) {
  const box = useRef(null);
  const id = useId();
  useLayoutEffect(() => {
    const before = document.activeElement;
    const dialog = box.current;
    dialog.showModal();
    return () => {
      dialog.close(); // what lies behind an open one takes no focus
      before?.focus?.();
    };
  }, []);
  return html`
    <dialog ref=${box} aria-labelledby=${id} onCancel=${(event) => { event.preventDefault(); onClose(); }}>
      <h2 id=${id}>${title}</h2>
      ${children}
    </dialog>`;
}

/** A dialog that asks before `work` is done. */
export function Confirm({ title, action, danger, work, onClose, children }) {
  const [run, busy, error] = useAction(async () => { await work(); onClose(true); });
  return html`
    <${Dialog} title=${title} onClose=${() => onClose(false)}>
      ${children}
      <${Problem} error=${error} />
      <div class="row end">
        <button type="button" onClick=${() => onClose(false)}>Keep as it is</button>
        <button type="button" class=${danger ? "danger" : "primary"} disabled=${busy} onClick=${run}>${action}</button>
      </div>
    <//>`;
}

export function Copy({ text, label = "Copy" }) {
  const [done, setDone] = useState(false);
  useEffect(() => {
    const timer = done ? setTimeout(() => setDone(false), 1500) : null;
    return () => clearTimeout(timer);
  }, [done]);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setDone(true);
  };
  return html`<button type="button" class="small" onClick=${copy}>${done ? "Copied" : label}</button>`;
}

/** A score from 0 to 1 on a line, with its interval as a whisker. */
export function Interval({ score, low, high, muted }) {
  if (score === null || score === undefined) return null;
  const x = (share) => 3 + 174 * Math.min(Math.max(share, 0), 1);
  const has = low !== null && low !== undefined && high !== null && high !== undefined;
  const said = has ? `${percent(score)}, interval ${percent(low)} to ${percent(high)}` : percent(score);
  return html`
    <svg class=${muted ? "interval muted" : "interval"} viewBox="0 0 180 14" width="180" height="14" role="img" aria-label=${said}>
      <line class="ground" x1="3" x2="177" y1="7" y2="7" />
      ${has ? html`<line class="whisker" x1=${x(low)} x2=${x(high)} y1="7" y2="7" /><line class="whisker" x1=${x(low)} x2=${x(low)} y1="3" y2="11" /><line class="whisker" x1=${x(high)} x2=${x(high)} y1="3" y2="11" />` : null}
      <circle cx=${x(score)} cy="7" r="2.5" />
    </svg>`;
}

/** A prompt template with the columns of a row in it. */
function filled(template, row) {
  return template.replaceAll(/\{\s*(\w+)[^}]*\}/g, (whole, name) => (typeof row[name] === "object" ? JSON.stringify(row[name]) : row[name] ?? whole)).trim();
}

/** The demo's tasks, each with a button that trains its adapter: what there is to do on an empty server. */
export function Demo() {
  const { data, error } = useGet("api/demo");
  const [train, busy, refused] = useAction(async (task) => {
    const job = await call("POST", path`api/demo/${task}/train`, { recipe: { validation: 0.05 } }); // for a held-out curve
    window.location.hash = path`#/runs/${job.id}`;
  });
  if (error) return html`<${Problem} error=${error} />`;
  if (!data) return null;
  return html`
    <div class="demo">
      <p>Or train one of the demo's adapters, with one click, on this machine:</p>
      <${Problem} error=${refused} />
      <${Table} caption="Tasks of the demo" rows=${data.items} columns=${[
        { title: "Train", quiet: true, cell: (row) => html`<button type="button" class="small" disabled=${busy} onClick=${() => train(row.task)}>Train ${row.task}</button>` },
        { title: "Reads", wide: true, cell: (row) => html`<code>${filled(row.prompt, row.example)}</code>` },
        { title: "Answers", wide: true, cell: (row) => html`<code>${filled(row.completion, row.example)}</code>` },
        { title: "Judged by", cell: (row) => row.metric },
      ]} />
    </div>`;
}
