// A completion as tokens that show what else might have been said: tinted by probability, with the alternatives on
// hover, on focus, and by the arrow keys.

import { percent } from "./format.js";
import { html, useRef, useState } from "./html.js";

/** A token of the chat route as the vocabulary spells it: its bytes where it is no whole character. */
function spelled({ token, bytes }) {
  if (!bytes?.length || !token.includes("\ufffd")) return token;
  return `bytes:${bytes.map((one) => `\\x${one.toString(16).padStart(2, "0")}`).join("")}`;
}

/**
 * The tokens that one chunk of either route brings: [{text, name, logprob, top: [[name, logprob]]}]. A character of
 * several tokens is the text of the last of them; `decoder` keeps its beginning from one chunk to the next.
 */
export function readTokens(choice, decoder = new TextDecoder()) {
  const found = choice.logprobs;
  if (!found) return [];
  if (found.content) {
    return found.content.map((one) => ({
      text: one.bytes?.length ? decoder.decode(Uint8Array.from(one.bytes), { stream: true }) : one.token,
      name: spelled(one), logprob: one.logprob, top: one.top_logprobs.map((other) => [spelled(other), other.logprob]),
    }));
  }
  const ends = [...found.text_offset.slice(1), null];
  const characters = Array.from(choice.text);
  const start = found.text_offset[0] ?? 0;
  return found.tokens.map((name, i) => {
    const broken = name.startsWith("bytes:"); // a part of a character: its text comes with the part that ends it
    const text = broken ? characters.slice(found.text_offset[i] - start, ends[i] === null ? undefined : ends[i] - start).join("") : name;
    return { text, name, logprob: found.token_logprobs[i], top: Object.entries(found.top_logprobs[i] ?? {}) };
  });
}

const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";

function Odds({ token, box }) {
  const width = 230;
  const left = Math.max(6, Math.min(box.left, window.innerWidth - width - 8));
  const above = box.bottom > window.innerHeight - 190;
  const place = above ? { left: `${left}px`, bottom: `${window.innerHeight - box.top + 6}px` } : { left: `${left}px`, top: `${box.bottom + 6}px` };
  const known = token.top.some(([name]) => name === token.name);
  const rows = (known ? token.top : [[token.name, token.logprob], ...token.top]).toSorted((a, b) => b[1] - a[1]);
  return html`
    <div class="odds" role="tooltip" style=${place}>
      <table>
        <tbody>
          ${rows.map(([name, logprob]) => html`
            <tr class=${name === token.name ? "taken" : ""}>
              <td>${visible(name)}</td>
              <td class="number">${percent(Math.exp(logprob))}</td>
              <td class="barcell"><span class="bar" style=${{ width: `${100 * Math.exp(logprob)}%` }}></span></td>
            </tr>`)}
        </tbody>
      </table>
    </div>`;
}

export function Tokens({ tokens, label }) {
  const [at, setAt] = useState(0);
  const [shown, setShown] = useState(null);
  const list = useRef(null);
  const show = (i, element) => setShown({ i, box: element.getBoundingClientRect() });
  const onKeyDown = (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") setShown(null);
    if (!step) return;
    event.preventDefault();
    const next = Math.min(Math.max(at + step, 0), tokens.length - 1);
    setAt(next);
    list.current.querySelectorAll(".token")[next].focus();
  };
  return html`
    <span ref=${list} role="toolbar" aria-label=${`Tokens of ${label}, with the arrow keys one by one`} onKeyDown=${onKeyDown} onMouseLeave=${() => setShown(null)}>
      ${tokens.map((token, i) => {
        const p = Math.exp(token.logprob);
        return html`<span
          key=${i} class="token" role="button" tabindex=${i === at ? 0 : -1} style=${{ "--p": p.toFixed(3) }}
          aria-label=${`${visible(token.text || token.name)} ${percent(p)}`}
          onMouseEnter=${(event) => show(i, event.currentTarget)}
          onFocus=${(event) => { setAt(i); show(i, event.currentTarget); }}
          onBlur=${() => setShown(null)}>${/^\n+$/.test(token.text) ? html`<span class="glyph">⏎</span>${token.text}` : token.text}</span>`;
      })}
      ${shown && tokens[shown.i] ? html`<${Odds} token=${tokens[shown.i]} box=${shown.box} />` : null}
    </span>`;
}
