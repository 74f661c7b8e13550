"""A process with the published `predibase` package: runs the code that it is sent, a JSON object a line.

In: `{"gateway": url, "token": key, "code": text, "names": {...}}`. Out: `{"result": ..., "error": text | null}`, the
value of the variable `result` and what was raised.
A process of its own, since the package keeps sessions that nothing closes and warns as it is imported.
"""

import contextlib
import io
import json
import os
import sys
import traceback


def main() -> None:
    out = sys.stdout
    clients = {}
    for line in sys.stdin:
        asked = json.loads(line)
        names = {"result": None, **asked["names"]}
        error = None
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
            try:
                key = asked["gateway"], asked["token"]
                if key not in clients:
                    os.environ["PREDIBASE_GATEWAY"], os.environ["PREDIBASE_API_TOKEN"] = key
                    from predibase import Predibase

                    clients[key] = Predibase()
                names["pb"] = clients[key]
                exec(compile(asked["code"], "<sdk>", "exec"), names)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
                names["trace"] = traceback.format_exc()
        answer = {"result": names["result"], "error": error, "printed": printed.getvalue(), "trace": names.get("trace")}
        print(json.dumps(answer, default=str), file=out, flush=True)


if __name__ == "__main__":
    main()
