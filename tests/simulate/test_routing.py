from __future__ import annotations

from collections import Counter

from tests.simulate.scenarios import flat, scenario

from lorikeet.simulate.replica import Replica
from lorikeet.simulate.routing import make_router
from lorikeet.simulate.scenario import Replicas


def replicas(count: int) -> list[Replica]:
    return [Replica(scenario().engine, flat(1e-3)) for _ in range(count)]


def test_least_loaded_takes_turns_among_equals() -> None:
    fleet = replicas(3)
    route = make_router(Replicas(count=3), fleet)
    assert [route(None) for _ in range(4)] == [0, 1, 2, 0]
    fleet[1].in_flight, fleet[2].in_flight = 2, 1
    fleet[0].in_flight = 5
    assert [route("x"), route("x")] == [2, 2]


def test_a_hash_keeps_an_adapter_where_it_is() -> None:
    fleet = replicas(8)
    route = make_router(Replicas(count=8, routing="adapter_hash"), fleet)
    homes = {name: route(name) for name in map(str, range(800))}
    fleet[homes["7"]].in_flight = 1000
    assert all(route(name) == home for name, home in homes.items())
    assert min(Counter(homes.values()).values()) > 50  # spread over all


def test_affinity_leaves_home_only_when_home_is_over_its_bound() -> None:
    fleet = replicas(4)
    route = make_router(Replicas(count=4, routing="adapter_affinity", bound=1.5), fleet)
    home = route("hot")
    taken = Counter[int]()
    for _ in range(400):
        chosen = route("hot")
        fleet[chosen].in_flight += 1
        taken[chosen] += 1
        assert fleet[chosen].in_flight <= 1.5 * (sum(replica.in_flight for replica in fleet)) / 4 + 1
    assert taken[home] == max(taken.values()) and len(taken) >= 3
    for replica in fleet:
        replica.in_flight = 0
    assert route("hot") == home
