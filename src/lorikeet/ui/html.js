// What every file of the page is written with: htm templates that make Preact nodes, and Preact's hooks.
// Preact puts text into text nodes, so whatever comes from the server is shown as it is and never becomes markup.

import { Fragment, h, render } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
export { Fragment, render };
export { useCallback, useEffect, useId, useLayoutEffect, useMemo, useReducer, useRef, useState } from "./vendor/preact-hooks.js";
