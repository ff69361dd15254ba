"""The answers of suites/mixed48.jsonl found once more, by counting, searching or exact arithmetic.

None uses the idea by which a question is meant to be solved, where trying everything will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import combinations, pairwise, permutations, product

import sympy

X = sympy.Symbol("x", positive=True)
Answer = int | Fraction | sympy.Expr


def count(tried: Iterator[bool]) -> int:
    return sum(tried)


def share(tried: Iterator[bool]) -> Fraction:
    every = list(tried)
    return Fraction(sum(every), len(every))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def only(found: Iterator[int]) -> int:
    (one,) = found
    return one


def product_of_sum_and_cubes() -> Answer:
    # b = 7 - a: the two roots for a are the two numbers.
    roots = sympy.solve(X**3 + (7 - X) ** 3 - 133, X)
    return math.prod(int(root) for root in roots)


def fourth_powers() -> Answer:
    root = sympy.solve(X + 1 / X - 4, X)[0]
    return sympy.simplify(root**4 + root**-4)


def arithmetic_roots() -> Answer:
    # The middle root of three with the sum 6 is 2, their product 6: 2 - d, 2, 2 + d.
    d = sympy.solve((2 - X) * 2 * (2 + X) - 6, X)[0]
    a, b, c = 2 - d, 2, 2 + d
    return sympy.simplify(a * b + b * c + a * c)


def least_eigenvalue() -> Answer:
    return min(sympy.Matrix([[1, 1], [1, 4]]).eigenvals(), key=float)


def value_of_f() -> Answer:
    # f(3) + 2 f(-2) = 27 and f(-2) + 2 f(3) = 12
    return int(sympy.Matrix([[1, 2], [2, 1]]).solve(sympy.Matrix([27, 12]))[0])


def digits_modulo_11() -> Answer:
    return int("".join(map(str, range(1, 61)))) % 11


def zeros_in_base_12() -> Answer:
    left, zeros = math.factorial(125), 0
    while left % 12 == 0:
        left, zeros = left // 12, zeros + 1
    return zeros


def airy_sets() -> Answer:
    return count(
        all(b - a >= 3 for a, b in combinations(chosen, 2))
        for size in range(13)
        for chosen in combinations(range(1, 13), size)
    )


def round_table() -> Answer:
    # Ada takes seat 0; Ben is one of the others.
    return count(row.index("Ben") not in (0, 4) for row in permutations(["Ben", *"cdef"]))


@cache
def walks(x: int, y: int) -> int:
    if x < 0 or y < 0 or y > x + 1:
        return 0
    return 1 if (x, y) == (0, 0) else walks(x - 1, y) + walks(x, y - 1)


@cache
def tilings(free: frozenset[tuple[int, int]]) -> int:
    if not free:
        return 1
    column, row = min(free)
    partners = free & {(column + 1, row), (column, row + 1)}
    return sum(tilings(free - {(column, row), partner}) for partner in partners)


def expected_jumps() -> Answer:
    # e(x) = 1 + (e(x-1) + e(x+1)) / 2 between the ends.
    e = dict(zip(range(-1, 3), sympy.symbols("e:4"), strict=True))
    zero = sympy.Integer(0)
    equations = [e[x] - 1 - (e.get(x - 1, zero) + e.get(x + 1, zero)) / 2 for x in range(-1, 3)]
    return sympy.solve(equations, list(e.values()))[e[0]]


def expected_faces() -> Answer:
    throws = list(product(range(6), repeat=4))
    return Fraction(sum(len(set(throw)) for throw in throws), len(throws))


def heron(a: int, b: int, c: int) -> float:
    s = (a + b + c) / 2
    return math.sqrt(s * (s - a) * (s - b) * (s - c))


def octagon() -> Answer:
    r = 1 / sympy.sin(sympy.pi / 8)  # around the centre of an octagon of side 2
    return sympy.simplify(8 * r**2 * sympy.sin(sympy.pi / 4) / 2)


def sphere_in_cone() -> Answer:
    # Its centre is as far from the base as from the line through (6, 0) and (0, 8).
    return only(
        r for r in range(1, 8) if math.isclose(abs(8 * 0 + 6 * r - 48) / math.hypot(8, 6), r)
    )


def midpoint_triangle() -> Answer:
    corners = [(0, 0), (6, 0), (2, 5)]
    (ax, ay), (bx, by), (cx, cy) = [
        (Fraction(x + u, 2), Fraction(y + v, 2)) for (x, y), (u, v) in combinations(corners, 2)
    ]
    return abs((bx - ax) * (cy - ay) - (cx - ax) * (by - ay)) / 2


def recursion() -> Answer:
    a = 1
    for n in range(1, 10):
        a = 2 * a + n
    return a


def arithmetic_sum() -> Answer:
    step = Fraction(45 - 17, 12 - 5)
    return int(sum(17 + (n - 5) * step for n in range(1, 21)))


def geometric_start() -> Answer:
    a, r = sympy.symbols("a r")
    return sympy.solve([a - 12 * (1 - r), a**2 - 48 * (1 - r**2)], [a, r])[-1][0]


def quotients() -> Answer:
    before, last = Fraction(2), Fraction(3)
    for _ in range(2021):
        before, last = last, last / before
    return last


def odd_fibonacci() -> Answer:
    return sum(int(sympy.fibonacci(n)) for n in range(1, 20, 2))


ANSWERS: dict[str, Callable[[], Answer]] = {
    "algebra-1": product_of_sum_and_cubes,
    "algebra-2": fourth_powers,
    "algebra-3": lambda: count(abs(x - 1) + abs(x - 4) == abs(2 * x - 5) for x in range(-10, 11)),
    "algebra-4": arithmetic_roots,
    "algebra-5": least_eigenvalue,
    "algebra-6": value_of_f,
    "algebra-7": lambda: only(
        2**k for k in range(20) if Fraction(k) + Fraction(k, 2) + Fraction(k, 4) == 7
    ),
    "algebra-8": lambda: only(x for x in range(50) if math.sqrt(x + 7) + math.sqrt(x) == 7),
    "number-theory-1": lambda: 3**2024 % 100,
    "number-theory-2": lambda: count(math.isqrt(d) ** 2 == d for d in divisors(7200)),
    "number-theory-3": lambda: next(n for n in range(1, 316) if (n % 5, n % 7, n % 9) == (2, 3, 4)),
    "number-theory-4": lambda: count((n * n + n) % 12 == 0 for n in range(1, 1001)),
    "number-theory-5": digits_modulo_11,
    "number-theory-6": lambda: max(n for n in range(1, 500) if len(divisors(n)) == 15),
    "number-theory-7": zeros_in_base_12,
    # Both exceed 18, and x is at most 18 * 18 + 18.
    "number-theory-8": lambda: count((18 * x) % (x - 18) == 0 for x in range(19, 343)),
    "counting-1": lambda: count("AA" not in "".join(word) for word in product("AB", repeat=7)),
    "counting-2": lambda: count(
        all(abs(a - b) != 1 for a, b in pairwise(row)) for row in permutations(range(1, 7))
    ),
    "counting-3": airy_sets,
    "counting-4": lambda: count(sum(map(int, str(n))) == 9 for n in range(1000, 10000)),
    "counting-5": round_table,
    "counting-6": lambda: walks(6, 6),
    "counting-7": lambda: tilings(frozenset(product(range(8), range(3)))),
    "counting-8": lambda: count(
        all(f[f[x]] == f[x] for x in range(5)) for f in product(range(5), repeat=5)
    ),
    "probability-1": lambda: share(max(dice) == 5 for dice in product(range(1, 7), repeat=3)),
    "probability-2": lambda: share("HHH" not in "".join(c) for c in product("HT", repeat=8)),
    "probability-3": lambda: share(sum(pair) % 3 == 0 for pair in combinations(range(1, 21), 2)),
    "probability-4": lambda: share(
        len({i < 4 for i in drawn}) == 2 for drawn in combinations(range(9), 3)
    ),
    "probability-5": lambda: Fraction(1 - 2 * Fraction(1, 5)) ** 2,
    "probability-6": expected_jumps,
    "probability-7": lambda: share(
        sum(i == j for i, j in enumerate(order)) == 2 for order in permutations(range(5))
    ),
    "probability-8": expected_faces,
    "geometry-1": lambda: int(2 * heron(13, 14, 15) / (13 + 14 + 15)),
    "geometry-2": lambda: Fraction(9 * 12, math.isqrt(9**2 + 12**2)),
    "geometry-3": lambda: math.isqrt((9 + 4) ** 2 - (9 - 4) ** 2),
    "geometry-4": lambda: sympy.sqrt(7**2 + 8**2 - 2 * 7 * 8 * sympy.cos(sympy.pi / 3)),
    "geometry-5": octagon,
    "geometry-6": sphere_in_cone,
    "geometry-7": midpoint_triangle,
    "geometry-8": lambda: 2 * math.isqrt(10**2 - 6**2),
    "sequences-1": recursion,
    "sequences-2": lambda: sum((Fraction(1, k * (k + 1)) for k in range(1, 100)), Fraction()),
    "sequences-3": arithmetic_sum,
    "sequences-4": geometric_start,
    "sequences-5": quotients,
    "sequences-6": lambda: sum(k * math.factorial(k) for k in range(1, 21)) % 1000,
    "sequences-7": odd_fibonacci,
    "sequences-8": lambda: math.prod(1 - Fraction(1, k * k) for k in range(2, 51)),
}
