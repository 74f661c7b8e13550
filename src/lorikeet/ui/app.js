// The frame: which page is shown, its navigation, the theme, and the dialog that asks for a key.

import { NEEDS_KEY, get, key, useGet } from "./api.js";
import { Fragment, html, render, useEffect, useLayoutEffect, useRef, useState } from "./html.js";
import { Check, Dialog, Input, Problem } from "./parts.js";
import { Access, manages } from "./access.js";
import { Adapters, Repository } from "./adapters.js";
import { Leaderboard } from "./leaderboard.js";
import { NewRun } from "./newrun.js";
import { Playground } from "./playground.js";
import { Run } from "./run.js";
import { Runs } from "./runs.js";
import { Serving } from "./serving.js";

const PAGES = [
  ["playground", "Playground"],
  ["runs", "Runs"],
  ["adapters", "Adapters"],
  ["serving", "Serving"],
  ["leaderboard", "Leaderboard"],
];
const ACCESS = ["access", "Access"]; // for those who manage keys

/** `#/runs/7f3a?with=1` -> {parts: ["runs", "7f3a"], query}. */
function place() {
  const [route, query = ""] = window.location.hash.replace(/^#\/?/, "").split("?");
  const parts = route.split("/").filter(Boolean).map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  return { parts: parts.length ? parts : ["playground"], query: new URLSearchParams(query) };
}

function shown({ parts: [page, id], query }, me) {
  if (page === "playground") return html`<${Playground} query=${query} />`;
  if (page === "runs" && id === "new") return html`<${NewRun} query=${query} />`;
  if (page === "runs" && id) return html`<${Run} key=${id} id=${id} />`;
  if (page === "runs") return html`<${Runs} />`;
  if (page === "adapters" && id) return html`<${Repository} key=${id} name=${id} chosen=${query.get("version")} />`;
  if (page === "adapters") return html`<${Adapters} />`;
  if (page === "serving") return html`<${Serving} />`;
  if (page === "leaderboard") return html`<${Leaderboard} />`;
  if (page === "access") return html`<${Access} me=${me.data} onMe=${me.reload} />`;
  return html`<h1 tabindex="-1">There is no such page</h1><p>The pages are named above.</p>`;
}

const THEMES = { auto: "light", light: "dark", dark: "auto" };

function useTheme() {
  const [theme, setTheme] = useState(localStorage.getItem("lorikeet.theme") ?? "auto");
  useLayoutEffect(() => { // what the button says holds: whoever reloads at once finds it so
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    localStorage.setItem("lorikeet.theme", theme);
    window.dispatchEvent(new Event("lorikeet:theme"));
  }, [theme]);
  return [theme, () => setTheme(THEMES[theme] ?? "auto")];
}

function KeyDialog({ onDone, onClose }) {
  const [value, setValue] = useState("");
  const [keep, setKeep] = useState(false);
  const [error, setError] = useState(null);
  const submit = async (event) => {
    event.preventDefault();
    key.set(value.trim(), keep);
    try {
      const me = await get("api/me");
      if (me.needs_key && !me.key && !me.name) throw new Error("the server does not know this key");
      onDone();
    } catch (refused) {
      key.clear();
      setError(refused);
    }
  };
  return html`
    <${Dialog} title="This server asks for a key" onClose=${onClose}>
      <form class="stack" onSubmit=${submit}>
        <p class="muted">Whoever runs the server makes keys with <code>lorikeet keys create</code>.</p>
        <${Input} label="API key" type="password" autocomplete="off" required value=${value} onValue=${setValue} />
        <${Check} label="Keep it in this browser" checked=${keep} onValue=${setKeep} />
        <${Problem} error=${error} />
        <div class="row end"><button type="submit" class="primary">Use this key</button></div>
      </form>
    <//>`;
}

function App() {
  const [at, setAt] = useState(place());
  const [asking, setAsking] = useState(false);
  const [turn, setTurn] = useState(0);
  const [theme, nextTheme] = useTheme();
  const me = useGet("api/me");
  const info = useGet("api/info");
  const main = useRef(null);
  const first = useRef(true);

  useEffect(() => {
    const move = () => setAt(place());
    const ask = () => setAsking(true);
    window.addEventListener("hashchange", move);
    window.addEventListener(NEEDS_KEY, ask);
    return () => {
      window.removeEventListener("hashchange", move);
      window.removeEventListener(NEEDS_KEY, ask);
    };
  }, []);
  useEffect(() => {
    if (me.data?.needs_key && !key.get()) setAsking(true);
  }, [me.data]);
  const where = at.parts.join("/");
  useEffect(() => {
    const title = [...PAGES, ACCESS].find(([name]) => name === at.parts[0])?.[1] ?? "Not found";
    document.title = `${title} · Lorikeet`;
    if (!first.current) (main.current.querySelector("h1") ?? main.current).focus();
    first.current = false;
  }, [where]);

  const known = () => {
    setAsking(false);
    setTurn(turn + 1);
    me.reload();
    info.reload();
  };
  const forget = () => {
    key.clear();
    known();
  };
  return html`
    <${Fragment}>
      <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>Skip to the page</a>
      <header class="top">
        <a class="brand" href="#/playground"><svg viewBox="0 0 16 16" aria-hidden="true"><path fill="var(--accent)" d="M2 2h3v9h9v3H2z M7 2h7v7h-3V5H7z" /></svg>Lorikeet</a>
        <nav aria-label="Pages">
          ${(manages(me.data) ? [...PAGES, ACCESS] : PAGES).map(([name, title]) => html`<a href=${`#/${name}`} aria-current=${at.parts[0] === name ? "page" : null}>${title}</a>`)}
        </nav>
        <div class="end">
          ${info.data ? html`<span class="base" title="The base model of this server">${info.data.base.name}</span>` : null}
          ${key.get() ? html`<span>${me.data?.name}</span><button type="button" class="small" onClick=${forget}>Forget the key</button>` : null}
          <button type="button" class="small" onClick=${nextTheme}>Theme: ${theme}</button>
        </div>
      </header>
      <main id="main" tabindex="-1" ref=${main} key=${turn}>${shown(at, me)}</main>
      ${asking ? html`<${KeyDialog} onDone=${known} onClose=${() => setAsking(false)} />` : null}
    <//>`;
}

const box = document.getElementById("page");
box.replaceChildren();
render(html`<${App} />`, box);
