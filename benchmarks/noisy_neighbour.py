"""Does one user's flood slow down the others?

Victims, each on an adapter of its own, ask for 20% of what the server can do; a neighbour on another adapter asks for
200% of it. Open loop, the same arrivals of the victims each time: the victims alone, with the neighbour, and with the
neighbour on a server that takes requests as they come (`--no-fair`). The last line is JSON.
"""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np

from load import Ask, Json, compare, median
from open_loop import Arrivals, Prompts, flags, last_line, measured, percentiles, prepared
from ours import ServerSide, Setup
from shapes import fixture
from worker import progress

EXAMPLES = """examples:
  python benchmarks/noisy_neighbour.py                                        a base of 0.39 B, 9 repeats
  python benchmarks/noisy_neighbour.py --shape nano --max-seqs 32 --clients 32 the embedded base, wide steps
"""
VICTIMS, VICTIM_LOAD, NEIGHBOUR_LOAD, BAR = 4, 0.2, 2.0, 1.5


class Traffic(Prompts):
    """Poisson arrivals."""

    def arrivals(self, name: str, rate: float, seconds: float) -> Arrivals:
        """Requests on the adapter `name` at `rate` a second."""
        gaps = self.draw.exponential(1 / rate, int(rate * seconds * 2) + 10)
        return [(float(at), self.prompt(), {"model": name}) for at in np.cumsum(gaps) if at < seconds]


def capacity(side: ServerSide, traffic: Traffic, options: Namespace) -> float:
    """Requests a second with `--clients` that never wait between two."""
    rounds = max(int(options.capacity_requests // options.clients), 1)
    clients = [[Ask(traffic.prompt(), c % len(side.names)) for _ in range(rounds)] for c in range(options.clients)]
    side.run([one[:1] for one in clients], 2)
    return options.clients * rounds / float(side.run(clients, options.new)["seconds"])


def play(side: ServerSide, victims: Arrivals, neighbour: Arrivals, options: Namespace) -> Json:
    """Latencies of the victims, to the first and to the last token, and what became of the neighbour's requests."""
    order = sorted([(*one, True) for one in victims] + [(*one, False) for one in neighbour], key=lambda one: one[0])
    said = side.clients.ask("open_loop", arrivals=[one[:3] for one in order], new=options.new)
    ours = np.array([one[3] for one in order])
    first, last = measured(said["first"]), measured(said["last"])
    return {
        **percentiles("", last[ours]), **percentiles("ttft_", first[ours], (50, 95)),
        "victims": int(ours.sum()), "failed": int(np.isnan(last[ours]).sum()),
        "neighbour": int((~ours).sum()), "neighbour_refused": int(np.isnan(last[~ours]).sum()),
        **percentiles("late_", measured(said["late"]), (99,)),
    }  # fmt: skip


def measure(setup: Setup, options: Namespace) -> Json:
    traffic = Traffic(options, setup.fixture.spec.vocab_size)
    sides = {fair: ServerSide(replace(setup, settings=setup.settings | {"fair": fair})) for fair in (True, False)}
    found: dict[str, list[Json]] = {"alone": [], "fair": [], "first come": []}
    try:
        most = capacity(sides[True], traffic, options)
        capacity(sides[False], traffic, options)  # warm
        progress(f"capacity: {most:.1f} requests/s")
        noisy, *names = sides[True].names
        for repeat in range(options.repeats):
            calm = [
                one for name in names for one in traffic.arrivals(name, VICTIM_LOAD * most / VICTIMS, options.seconds)
            ]
            flood = traffic.arrivals(noisy, NEIGHBOUR_LOAD * most, options.seconds)
            cases = {"alone": (True, []), "fair": (True, flood), "first come": (False, flood)}
            for case in np.roll(list(cases), repeat):
                fair, beside = cases[case]
                found[case].append(play(sides[fair], calm, beside, options))
                progress(f"{repeat + 1} of {options.repeats}, {case}: {json.dumps(found[case][-1])}")
    finally:
        for side in sides.values():
            side.close()
    p95 = {case: [one["p95"] for one in each] for case, each in found.items()}
    return {
        "capacity": most,
        "p95_seconds": {case: median(values) for case, values in p95.items()},
        "failed": sum(one["failed"] for case in ("alone", "fair") for one in found[case]),
        "ratios": [
            compare("p95 of the victims, fair / alone", p95["fair"], p95["alone"], BAR, at_most=True, clients=0),
            compare("p95 of the victims, first come / alone", p95["first come"], p95["alone"], BAR, clients=0),
        ],
        "plays": found,
    }  # fmt: skip


def arguments() -> Namespace:
    parser = flags(__doc__, EXAMPLES, shape="half", clients=8, prompt=64, new=64)
    add = parser.add_argument
    add("--rank", type=int, default=16)
    add("--repeats", type=int, default=9)
    add("--seconds", type=float, default=20.0, help="of arrivals, each time")
    add("--capacity-requests", type=int, default=64)
    add("--max-seqs", type=int, default=8, help="of the server")
    add("--queue", type=int, default=32, help="of the server")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    made = fixture(options.shape, options.cache)
    limits = {"max_seqs": options.max_seqs, "queue": options.queue}
    with prepared(options, made, [options.rank] * (VICTIMS + 1), options.max_seqs, **limits) as served:
        result = measure(served, options)
    for ratio in result["ratios"]:
        print(json.dumps(ratio))
    last_line("noisy_neighbour", options, result)


if __name__ == "__main__":
    main()
