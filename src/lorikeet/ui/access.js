// Who may use the server: keys, users and tenants, and the log of what was changed. For admins.

import { call, key as ownKey, path, useAction, useGet } from "./api.js";
import { ago, count, moment, value } from "./format.js";
import { html, useState } from "./html.js";
import { Check, Choice, Confirm, Copy, Dialog, Empty, Field, Input, Problem, Select, State, Table, Waiting } from "./parts.js";

const ROLES = [["user", "user: reads and generates"], ["trainer", "trainer: also trains, uploads, promotes, deletes"], ["admin", "admin: also keys, users, audit"]];
const ACTIONS = [
  "alias.move", "alias.remove", "checkpoint.create", "checkpoint.delete", "dataset.create", "dataset.delete", "evaluation.add",
  "job.cancel", "job.canceled", "job.complete", "job.create", "job.fail", "job.resume", "key.change", "key.create", "key.grant",
  "key.revoke", "repository.create", "repository.delete", "repository.describe", "tenant.create", "upload.begin", "upload.complete",
  "user.create", "user.disable", "user.enable", "version.complete", "version.create", "version.delete",
];
const DAY = 86400; // seconds

/** Whether the caller manages its tenant: an admin whose key is not confined to some repositories. */
export function manages(me) {
  return me?.role === "admin" && !me.key?.repositories;
}

/** A whole number from 1 on, null for an empty field. Raises for what is none. */
function whole(text, title) {
  if (!text.trim()) return null;
  const number = Number(text);
  if (!Number.isSafeInteger(number) || number < 1) throw new Error(`${title}: expected a whole number from 1 on, found "${text}"`);
  return number;
}

/** A form in a dialog. `work` gives what `onClose` gets; null is a dialog that was left. */
function Form({ title, action, work, onClose, children }) {
  const [run, busy, error] = useAction(async () => onClose(await work()));
  return html`
    <${Dialog} title=${title} onClose=${() => onClose(null)}>
      <form class="stack" onSubmit=${(event) => { event.preventDefault(); run(); }}>
        ${children}
        <${Problem} error=${error} />
        <div class="row end">
          <button type="button" onClick=${() => onClose(null)}>Leave it</button>
          <button type="submit" class="primary" disabled=${busy}>${action}</button>
        </div>
      </form>
    <//>`;
}

// --- keys ----------------------------------------------------------------------------------------------------------

function stateOf(key) {
  if (key.revoked) return "revoked";
  return key.expires && key.expires <= Date.now() / 1000 ? "expired" : "open";
}

/** Which repositories a key may use: `chosen` null is every one, else their names as typed. */
function Grants({ chosen, onChosen }) {
  return html`
    <${Choice} label="Which repositories" value=${chosen === null ? "all" : "some"} options=${[["all", "Every repository"], ["some", "Only these"]]} onValue=${(one) => onChosen(one === "all" ? null : "")} />
    ${chosen === null ? null : html`
      <${Field} label="Repositories" hint="Names, one a line. None: it may use the base alone.">
        ${(id) => html`<textarea id=${id} rows="3" value=${chosen} onInput=${(event) => onChosen(event.currentTarget.value)}></textarea>`}
      <//>`}`;
}

const namesIn = (chosen) => (chosen === null ? null : chosen.split(/[\s,]+/).filter(Boolean));

function CreateKey({ me, tenant, users, onClose }) {
  const first = !me.needs_key;
  const [form, setForm] = useState({ name: "", role: first ? "admin" : "user", user: "", days: "", requests: "", tokens: "" });
  const [chosen, setChosen] = useState(null);
  const text = (name) => ({ value: form[name], onValue: (typed) => setForm((before) => ({ ...before, [name]: typed })) });
  const work = async () => {
    const days = whole(form.days, "Days");
    const made = await call("POST", `api/keys${tenant}`, {
      name: form.name.trim(), role: form.role, user: form.user || null, repositories: namesIn(chosen),
      expires_in: days === null ? null : DAY * days, requests_per_minute: whole(form.requests, "Requests a minute"), tokens_per_day: whole(form.tokens, "Tokens a day"),
    });
    if (first && !tenant) ownKey.set(made.secret, false); // or this very page is locked out
    return { ...made, first };
  };
  return html`
    <${Form} title="New key" action="Make the key" work=${work} onClose=${onClose}>
      ${first ? html`<p class="note">The first key must be an admin's: from then on every request needs one. This tab uses it from the start.</p>` : null}
      <${Input} label="Name" required autocomplete="off" ...${text("name")} />
      <${Select} label="Role" options=${ROLES} ...${text("role")} />
      <${Select} label="Belongs to" options=${[["", "nobody: it is a program's"], ...users.map((user) => [user.name, user.name])]} ...${text("user")} />
      <${Grants} chosen=${chosen} onChosen=${setChosen} />
      <div class="fields">
        <${Input} label="Requests a minute" inputmode="numeric" placeholder="no limit" ...${text("requests")} />
        <${Input} label="Tokens a day" inputmode="numeric" placeholder="no limit" ...${text("tokens")} />
        <${Input} label="Days until it expires" inputmode="numeric" placeholder="never" ...${text("days")} />
      </div>
    <//>`;
}

/** The key itself, which nobody can look up again. */
function Secret({ made, onClose }) {
  return html`
    <${Dialog} title=${`The key ${made.name}`} onClose=${onClose}>
      <p>It is shown this once: the server keeps its hash alone.</p>
      <pre class="code" tabindex="0" role="group" aria-label="The key itself">${made.secret}</pre>
      ${made.first ? html`<p class="note">From now on every request needs a key. This tab uses it until it is closed.</p>` : null}
      <div class="row end"><${Copy} text=${made.secret} label="Copy the key" /><button type="button" class="primary" onClick=${onClose}>I have kept it</button></div>
    <//>`;
}

function ChangeKey({ one, own, tenant, onClose }) {
  const before = { role: one.role, repositories: one.repositories, requests_per_minute: one.requests_per_minute, tokens_per_day: one.tokens_per_day };
  const [form, setForm] = useState({ role: one.role, requests: String(one.requests_per_minute ?? ""), tokens: String(one.tokens_per_day ?? "") });
  const [chosen, setChosen] = useState(one.repositories === null ? null : one.repositories.join("\n"));
  const text = (name) => ({ value: form[name], onValue: (typed) => setForm((held) => ({ ...held, [name]: typed })) });
  const work = () => {
    const after = { role: form.role, repositories: namesIn(chosen), requests_per_minute: whole(form.requests, "Requests a minute"), tokens_per_day: whole(form.tokens, "Tokens a day") };
    const changed = Object.entries(after).filter(([name, to]) => JSON.stringify(to) !== JSON.stringify(before[name]));
    return changed.length ? call("PATCH", path`api/keys/${one.id}` + tenant, Object.fromEntries(changed)) : one;
  };
  return html`
    <${Form} title=${`Change ${one.name}`} action="Change the key" work=${work} onClose=${onClose}>
      ${own ? html`<p class="note">It is the key that this page uses: it can be given less here, and more only with another one.</p>` : null}
      <${Select} label="Role" hint="With less than it had, what is open with it ends." options=${ROLES} ...${text("role")} />
      <${Grants} chosen=${chosen} onChosen=${setChosen} />
      <div class="fields">
        <${Input} label="Requests a minute" inputmode="numeric" placeholder="no limit" ...${text("requests")} />
        <${Input} label="Tokens a day" inputmode="numeric" placeholder="no limit" ...${text("tokens")} />
      </div>
    <//>`;
}

function Revoke({ one, own, last, tenant, onClose }) {
  const work = () => call("DELETE", path`api/keys/${one.id}` + tenant);
  return html`
    <${Confirm} title=${`Revoke ${one.name}?`} action="Revoke the key" danger work=${work} onClose=${onClose}>
      <p>Requests with <code>${one.prefix}…</code> are refused from the next one on. It cannot be taken back.</p>
      ${own ? html`<p class="note">It is the key that this page uses.</p>` : null}
      ${last ? html`<p class="note">It is the last open key of an admin here. Whoever can write to the server's home folder makes another one: <code>lorikeet keys create --role admin NAME</code>.</p>` : null}
    <//>`;
}

const limits = (one) => [one.requests_per_minute && `${count(one.requests_per_minute)} requests a minute`, one.tokens_per_day && `${count(one.tokens_per_day)} tokens a day`].filter(Boolean).join(", ") || "none";

function Keys({ me, tenant, onMe, onHistory }) {
  const { data, error, reload } = useGet(`api/keys${tenant}`, 5);
  const users = useGet(`api/users${tenant}`).data?.items ?? [];
  const [closedToo, setClosedToo] = useState(false);
  const [asked, setAsked] = useState({}); // {create | secret | change | revoke: ...}
  const items = data?.items ?? [];
  const open = items.filter((one) => stateOf(one) === "open");
  const rows = closedToo ? items : open;
  const admins = open.filter((one) => one.role === "admin");
  const done = (next = {}) => { setAsked(next); reload(); onMe(); };
  return html`
    <div class="row">
      <button type="button" class="primary" disabled=${!data} onClick=${() => setAsked({ create: true })}>New key</button>
      ${items.length > open.length ? html`<${Check} label="Revoked and expired ones too" checked=${closedToo} onValue=${setClosedToo} />` : null}
    </div>
    <${Problem} error=${error} />
    ${!data && !error ? html`<${Waiting} what="keys" />` : null}
    ${data && !items.length ? html`<${Empty} title="No key yet"><p>${me.needs_key ? "This tenant has none." : "Whoever reaches this server is its admin. Once there is a key, every request needs one."}</p><//>` : null}
    ${rows.length ? html`<${Table} caption="Keys" rows=${rows} rowKey=${(one) => one.id} columns=${[
      { title: "Name", cell: (one) => one.name },
      { title: "Begins", cell: (one) => html`<code>${one.prefix}…</code>` },
      { title: "Role", cell: (one) => one.role },
      { title: "State", cell: (one) => html`<${State} state=${stateOf(one)} />` },
      { title: "User", cell: (one) => users.find((user) => user.id === one.user_id)?.name ?? "–" },
      { title: "Repositories", wide: true, cell: (one) => (one.repositories === null ? "every one" : one.repositories.join(", ") || "none") },
      { title: "Limits", wide: true, cell: limits },
      { title: "Requests today", number: true, cell: (one) => count(one.today.requests) },
      { title: "Tokens today", number: true, cell: (one) => count(one.today.tokens) },
      { title: "Last used", number: true, cell: (one) => ago(one.last_used) },
      { title: "Expires", number: true, cell: (one) => moment(one.expires).slice(0, 10) },
      { title: "Actions", quiet: true, cell: (one) => html`
        <button type="button" class="small" aria-label=${`History of ${one.name}`} onClick=${() => onHistory(one.id)}>History</button>${" "}
        ${stateOf(one) === "open" ? html`
          <button type="button" class="small" aria-label=${`Change ${one.name}`} onClick=${() => setAsked({ change: one })}>Change</button>${" "}
          <button type="button" class="small danger" aria-label=${`Revoke ${one.name}`} onClick=${() => setAsked({ revoke: one })}>Revoke</button>` : null}` },
    ]} />` : null}
    ${asked.create ? html`<${CreateKey} me=${me} tenant=${tenant} users=${users} onClose=${(made) => (made ? done({ secret: made }) : setAsked({}))} />` : null}
    ${asked.secret ? html`<${Secret} made=${asked.secret} onClose=${() => setAsked({})} />` : null}
    ${asked.change ? html`<${ChangeKey} one=${asked.change} own=${asked.change.id === me.key?.id} tenant=${tenant} onClose=${(made) => (made ? done() : setAsked({}))} />` : null}
    ${asked.revoke ? html`<${Revoke} one=${asked.revoke} tenant=${tenant} own=${asked.revoke.id === me.key?.id} last=${admins.length === 1 && admins[0].id === asked.revoke.id} onClose=${(made) => (made ? done() : setAsked({}))} />` : null}`;
}

// --- users and tenants -----------------------------------------------------------------------------------------------

function CreateUser({ tenant, onClose }) {
  const [name, setName] = useState("");
  const [role, setRole] = useState("user");
  const [email, setEmail] = useState("");
  const work = () => call("POST", `api/users${tenant}`, { name: name.trim(), role, email: email.trim() || null });
  return html`
    <${Form} title="New user" action="Add the user" work=${work} onClose=${onClose}>
      <${Input} label="Name" required autocomplete="off" value=${name} onValue=${setName} />
      <${Select} label="Role" hint="A key of theirs has no higher one." options=${ROLES} value=${role} onValue=${setRole} />
      <${Input} label="E-mail" type="email" autocomplete="off" value=${email} onValue=${setEmail} />
    <//>`;
}

function Users({ tenant, onHistory }) {
  const { data, error, reload } = useGet(`api/users${tenant}`, 5);
  const [creating, setCreating] = useState(false);
  const [changing, setChanging] = useState(null);
  const disabled = Boolean(changing?.disabled);
  const change = () => call("PATCH", path`api/users/${changing.name}` + tenant, { disabled: !disabled });
  const items = data?.items ?? [];
  return html`
    <div class="row"><button type="button" class="primary" disabled=${!data} onClick=${() => setCreating(true)}>New user</button></div>
    <${Problem} error=${error} />
    ${!data && !error ? html`<${Waiting} what="users" />` : null}
    ${data && !items.length ? html`<${Empty} title="No user yet"><p>Keys work without users. A user's keys can be shut out together.</p><//>` : null}
    ${items.length ? html`<${Table} caption="Users" rows=${items} rowKey=${(one) => one.id} columns=${[
      { title: "Name", cell: (one) => one.name },
      { title: "Role", cell: (one) => one.role },
      { title: "E-mail", wide: true, cell: (one) => one.email ?? "–" },
      { title: "State", cell: (one) => html`<${State} state=${one.disabled ? "disabled" : "open"} />` },
      { title: "Created", number: true, cell: (one) => moment(one.created) },
      { title: "Actions", quiet: true, cell: (one) => html`
        <button type="button" class="small" aria-label=${`History of ${one.name}`} onClick=${() => onHistory(one.id)}>History</button>${" "}
        <button type="button" class=${one.disabled ? "small" : "small danger"} aria-label=${`${one.disabled ? "Enable" : "Disable"} ${one.name}`} onClick=${() => setChanging(one)}>${one.disabled ? "Enable" : "Disable"}</button>` },
    ]} />` : null}
    ${creating ? html`<${CreateUser} tenant=${tenant} onClose=${(made) => { setCreating(false); if (made) reload(); }} />` : null}
    ${changing ? html`
      <${Confirm} title=${`${disabled ? "Enable" : "Disable"} ${changing.name}?`} action=${disabled ? "Enable the user" : "Disable the user"} danger=${!disabled} work=${change} onClose=${(done) => { setChanging(null); if (done) reload(); }}>
        <p>${disabled ? "Their keys open what they did before." : "Their keys open nothing until they are enabled again."}</p>
      <//>` : null}`;
}

function Tenants({ tenants, onHistory }) {
  const { data, error, reload } = tenants;
  const [creating, setCreating] = useState(false);
  const [name, setName] = useState("");
  return html`
    <div class="row"><button type="button" class="primary" disabled=${!data} onClick=${() => setCreating(true)}>New tenant</button></div>
    <p class="muted">Tenants see nothing of each other. Choose one above to manage its keys and users.</p>
    <${Problem} error=${error} />
    ${data ? html`<${Table} caption="Tenants" rows=${data.items} rowKey=${(one) => one.id} columns=${[
      { title: "Name", cell: (one) => one.name },
      { title: "Created", number: true, cell: (one) => moment(one.created) },
      { title: "Actions", quiet: true, cell: (one) => html`<button type="button" class="small" aria-label=${`History of ${one.name}`} onClick=${() => onHistory(one.id)}>History</button>` },
    ]} />` : html`<${Waiting} what="tenants" />`}
    ${creating ? html`
      <${Form} title="New tenant" action="Add the tenant" work=${() => call("POST", "api/tenants", { name: name.trim() })} onClose=${(made) => { setCreating(false); if (made) { setName(""); reload(); } }}>
        <${Input} label="Name" required autocomplete="off" value=${name} onValue=${setName} />
      <//>` : null}`;
}

// --- the log ---------------------------------------------------------------------------------------------------------

/** What a change was: from what to what where that is known, else what it was made with. */
function details(found) {
  const said = (name, one) => (one !== null ? value(one) : name === "repositories" ? "every one" : "no limit");
  return Object.entries(found ?? {}).map(([name, one]) => {
    const change = one && typeof one === "object" && "from" in one && "to" in one;
    return `${name.replaceAll("_", " ")} ${change ? `${said(name, one.from)} → ${said(name, one.to)}` : value(one)}`;
  }).join(", ");
}

/** The changes of a tenant, newest first; `subject` is the id of what they are about. */
function Audit({ tenant, subject, onSubject }) {
  const [action, setAction] = useState("");
  const [trail, setTrail] = useState([null]); // cursors of the pages seen
  const after = trail.at(-1);
  const query = new URLSearchParams({ limit: "50", ...(action ? { action } : {}), ...(subject ? { subject_id: subject } : {}), ...(after ? { after } : {}) });
  const { data, error } = useGet(`api/audit${tenant ? `${tenant}&` : "?"}${query}`, after ? 0 : 5);
  const first = (change) => (found) => { change(found); setTrail([null]); };
  return html`
    <div class="halves">
      <${Select} label="Action" options=${[["", "every one"], ...ACTIONS.map((one) => [one, one])]} value=${action} onValue=${first(setAction)} />
      <${Input} label="Id of what it is about" type="search" autocomplete="off" value=${subject} onValue=${first((text) => onSubject(text.trim()))} />
    </div>
    <${Problem} error=${error} />
    ${!data && !error ? html`<${Waiting} what="the log" />` : null}
    ${data && !data.items.length ? html`<p class="muted">Nothing like that was changed.</p>` : null}
    ${data?.items.length ? html`<${Table} caption="Changes" rows=${data.items} rowKey=${(one) => one.id} columns=${[
      { title: "When", cell: (one) => moment(one.at) },
      { title: "Who", cell: (one) => one.actor },
      { title: "Action", cell: (one) => one.action },
      { title: "About", wide: true, cell: (one) => html`<button type="button" class="link" title=${one.subject_id} onClick=${() => first(onSubject)(one.subject_id)}>${one.subject || one.subject_id.slice(0, 8)}</button>` },
      { title: "Details", wide: true, cell: (one) => details(one.details) },
    ]} />` : null}
    <div class="row">
      ${trail.length > 1 ? html`<button type="button" onClick=${() => setTrail(trail.slice(0, -1))}>Newer</button>` : null}
      ${data?.next ? html`<button type="button" onClick=${() => setTrail([...trail, data.next])}>Older</button>` : null}
    </div>`;
}

// --- the page --------------------------------------------------------------------------------------------------------

const Title = () => html`<h1 tabindex="-1">Access</h1>`;

export function Access({ me, onMe }) {
  if (!me) return html`<${Title} /><${Waiting} what="who you are" />`;
  if (!manages(me)) return html`<${Title} /><p>Keys and users are managed with an admin's key that is not confined to some repositories.</p>`;
  return html`<${Manager} me=${me} onMe=${onMe} />`;
}

function Manager({ me, onMe }) {
  const [view, setView] = useState("keys");
  const [subject, setSubject] = useState("");
  const [chosen, setChosen] = useState("");
  const tenants = useGet(me.operator ? "api/tenants" : null);
  const tenant = chosen && chosen !== me.tenant ? `?${new URLSearchParams({ tenant: chosen })}` : "";
  const history = (id) => { setSubject(id); setView("audit"); };
  const views = [["keys", "Keys"], ["users", "Users"], ...(me.operator ? [["tenants", "Tenants"]] : []), ["audit", "Audit log"]];
  const names = (tenants.data?.items ?? []).map((one) => [one.name, one.name]);
  return html`
    <div class="head"><${Title} />
      <${Choice} label="View" value=${view} options=${views} onValue=${(one) => { setSubject(""); setView(one); }} />
      ${names.length > 1 ? html`<div class="push"><${Select} label="Tenant" options=${names} value=${chosen || me.tenant} onValue=${setChosen} /></div>` : null}
    </div>
    ${view === "keys" ? html`<${Keys} key=${tenant} me=${me} tenant=${tenant} onMe=${onMe} onHistory=${history} />` : null}
    ${view === "users" ? html`<${Users} key=${tenant} tenant=${tenant} onHistory=${history} />` : null}
    ${view === "tenants" ? html`<${Tenants} tenants=${tenants} onHistory=${history} />` : null}
    ${view === "audit" ? html`<${Audit} key=${tenant} tenant=${tenant} subject=${subject} onSubject=${setSubject} />` : null}`;
}
