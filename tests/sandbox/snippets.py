"""Python as models write it: short programs whose output plain CPython decides.

A program begins with a line `#: name`.  All are deterministic; `DIFFERENT` names those whose output
in the sandbox must differ, with the reason and with what must be in it.
"""

import re

_TEXT = r"""
#: arithmetic
print(12 + 7 * 3 - 5, 7 // 2, -7 // 2, 7 % 3, -7 % 3, 2**10, 1 / 3)
#: big_integers
print(2**521 - 1)
print(pow(3, 10**18, 10**9 + 7), (10**40).bit_length())
#: factorial_digits
import math
n = math.factorial(100)
print(sum(int(d) for d in str(n)), str(n)[:20])
#: too_many_digits
print(10**5000)
#: gcd_lcm
from math import comb, gcd, isqrt, lcm, perm, prod
print(gcd(84, 36), lcm(4, 6, 10), comb(50, 6), perm(10, 3), isqrt(10**30), prod(range(1, 11)))
#: float_output
print(0.1 + 0.2, 1e300 * 1e10, float("nan"), -0.0, 1e16, 123456789.123456789)
print(round(2.5), round(-3.5))
#: fractions
from fractions import Fraction
total = sum(Fraction(1, n) for n in range(1, 11))
print(total, float(total), Fraction("0.125"), Fraction(3.5).limit_denominator(10))
#: decimal
from decimal import ROUND_HALF_UP, Decimal, getcontext
getcontext().prec = 50
print(Decimal(2).sqrt())
print(Decimal("2.675").quantize(Decimal("0.01"), rounding=ROUND_HALF_UP), Decimal(1) / 7)
#: decimal_signal
from decimal import Decimal
Decimal(1) / Decimal(0)
#: cmath
import cmath
print(cmath.sqrt(-4), cmath.exp(1j * cmath.pi).real, abs(3 + 4j), (1 + 2j) ** 2)
#: primes
def is_prime(n):
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

print([n for n in range(60) if is_prime(n)], sum(filter(is_prime, range(2000))))
#: sieve
N = 10**5
sieve = bytearray([1]) * (N + 1)
sieve[0:2] = b"\0\0"
for i in range(2, int(N**0.5) + 1):
    if sieve[i]:
        sieve[i * i :: i] = bytearray(len(range(i * i, N + 1, i)))
print(sum(sieve))
#: collatz
def collatz(n, seen={1: 1}):
    if n not in seen:
        seen[n] = 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)
    return seen[n]

print(max(range(1, 3000), key=collatz))
#: dynamic_programming
coins, goal = [1, 2, 5, 10, 20, 50, 100, 200], 200
ways = [1] + [0] * goal
for coin in coins:
    for value in range(coin, goal + 1):
        ways[value] += ways[value - coin]
print(ways[goal])
#: lru_cache
from functools import lru_cache

@lru_cache(maxsize=None)
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

print(fib(300))
print(fib.cache_info())
#: recursion
def hanoi(n, a="A", b="B", c="C"):
    return [] if n == 0 else hanoi(n - 1, a, c, b) + [(a, c)] + hanoi(n - 1, b, a, c)

print(len(hanoi(10)), hanoi(2))
#: recursion_limit
def down(n):
    return down(n + 1)

down(0)
#: deep_but_allowed
import sys
sys.setrecursionlimit(5000)
def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)
print(depth(4000))
#: itertools
from itertools import accumulate, chain, combinations, count, groupby, islice, permutations, product
print(len(list(permutations(range(6)))), list(combinations("abcd", 2))[:3])
print([(k, len(list(g))) for k, g in groupby("aaabbc")], list(islice(count(10, 5), 3)))
print(list(accumulate([1, 2, 3, 4])), sum(1 for a, b in product(range(6), repeat=2) if a + b == 7))
print(list(chain.from_iterable([[1], [2, 3]])))
#: puzzle_send_more
from itertools import permutations
for s, e, n, d, m, o, r, y in permutations(range(10), 8):
    if m == 1 and s == 9 and o == 0:
        if 1000*s+100*e+10*n+d + 1000*m+100*o+10*r+e == 10000*m+1000*o+100*n+10*e+y:
            print(s, e, n, d, m, o, r, y)
            break
#: collections
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque, namedtuple
print(Counter("mississippi").most_common(2), Counter(a=3) - Counter(a=1))
d = defaultdict(list)
for word in "the quick brown fox jumps".split():
    d[len(word)].append(word)
print(dict(d), deque([1, 2, 3], maxlen=2), OrderedDict(a=1))
Point = namedtuple("Point", "x y")
print(Point(1, 2)._replace(y=5), ChainMap({"a": 1}, {"a": 2, "b": 3})["b"])
#: heapq_bisect
import bisect
import heapq
heap = [5, 1, 8, 3]
heapq.heapify(heap)
print([heapq.heappop(heap) for _ in range(4)], heapq.nlargest(2, [4, 9, 2]))
print(bisect.bisect_left([1, 3, 3, 7], 3), bisect.bisect([1, 3, 3, 7], 3))
#: dijkstra
import heapq
graph = {"A": {"B": 1, "C": 4}, "B": {"C": 2, "D": 5}, "C": {"D": 1}, "D": {}}
best, queue = {}, [(0, "A")]
while queue:
    distance, node = heapq.heappop(queue)
    if node not in best:
        best[node] = distance
        for other, weight in graph[node].items():
            heapq.heappush(queue, (distance + weight, other))
print(best)
#: sets
a, b = {1, 2, 3}, {2, 3, 4}
print(a & b, a | b, a ^ b, a - b, {x * x % 7 for x in range(7)})
#: set_of_strings
print({"apple", "banana", "cherry"}, set("hello world"))
#: strings
s = "Hello, World"
print(s.lower(), s.upper(), s[::-1], s.replace("l", "L", 1), s.find("World"), s.split(", "))
print("a,b,,c".split(","), " pad ".strip(), "x".center(9, "*"), "-".join("abc"), s.swapcase())
#: formatting
pi = 3.14159265
print(f"{pi:.3f} {pi:10.2f}| {1234567:,} {255:#x} {255:08b} {0.25:.1%} {'left':<8}| {'right':>8}|")
print("%5d|%-5s|%e" % (42, "ab", 12345.678), "{0} {1} {0}".format("a", "b"), f"{pi=}", f"{'q'!r}")
#: textwrap
import textwrap
print(textwrap.fill("The quick brown fox jumps over the lazy dog " * 3, width=40))
print(textwrap.dedent("   x\n   y"), textwrap.shorten("one two three four", 12))
#: unicode
print("é ü ß 中文 🎉 ∑ √2 ≈ 1.41421 π", len("🎉"), "ß".upper(), "\u03b1".encode())
#: unicode_names
import unicodedata
print(unicodedata.name("∑"), unicodedata.normalize("NFD", "é").encode(), "ﬁ".casefold())
#: encodings
print("naïve".encode("latin-1"), b"\xff\xfe".decode("utf-8", "replace"), "é".encode("utf-16-le"))
b"\xff".decode("utf-8")
#: lone_surrogate
print("\ud800")
#: control_characters
print("tab\there", "bell\a", "nul\0", "esc\x1b[31mred\x1b[0m", "cr\rover")
#: regular_expressions
import re
text = "Call 555-1234 or 555-9876 on 2024-01-15."
print(re.findall(r"\d{3}-\d{4}", text), re.sub(r"\d", "#", text))
m = re.search(r"(?P<y>\d{4})-(?P<m>\d\d)", text)
print(m.group("y"), m.groupdict(), m.span(), re.split(r"\W+", "a, b;c"))
#: bad_regular_expression
import re
re.compile("(unclosed")
#: datetime
from datetime import date, datetime, timedelta, timezone
d = date(2024, 2, 28)
print(d + timedelta(days=2), (date(2024, 12, 25) - d).days)
print(d.strftime("%A %d %B %Y"), d.isocalendar())
print(datetime(2024, 1, 1, tzinfo=timezone.utc).isoformat())
print(datetime.strptime("03/04/21", "%d/%m/%y"))
#: calendar
import calendar
print(calendar.month(2024, 2))
print(calendar.isleap(1900), calendar.monthrange(2023, 2))
#: zone_information
from datetime import datetime
from zoneinfo import ZoneInfo
print(datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("America/New_York")).isoformat())
#: time_is_monotonic
import time
start = time.perf_counter()
time.sleep(0.01)
print(time.perf_counter() - start >= 0.01, time.time() > 1.6e9)
#: time_zone
import time
print(time.gmtime(0).tm_year, time.strftime("%Y", time.localtime(86400 * 365)))
#: statistics
import statistics as st
data = [2, 4, 4, 4, 5, 5, 7, 9]
print(st.mean(data), st.median(data), st.mode(data), st.pstdev(data), st.variance(data))
#: random_seed
import random
random.seed(42)
print(random.randint(1, 100), random.random(), random.choice("abc"), random.sample(range(10), 3))
items = list(range(5))
random.shuffle(items)
print(items, random.gauss(0, 1))
#: monte_carlo
import random
rng = random.Random(0)
inside = sum(rng.random() ** 2 + rng.random() ** 2 < 1 for _ in range(20000))
print(4 * inside / 20000)
#: json
import json
data = {"name": "Zoë", "n": [1, 2.5, None, True], "nested": {"k": "v"}}
print(json.dumps(data), json.dumps(data, ensure_ascii=False, indent=2, sort_keys=True))
print(json.loads('[1, {"a": "\\u00e9"}]'))
#: bad_json
import json
json.loads("{'a': 1}")
#: csv
import csv
import io
rows = list(csv.DictReader(io.StringIO("name,age\nAnn,30\n\"B, C\",25\n")))
print(rows, sum(int(r["age"]) for r in rows))
out = io.StringIO()
csv.writer(out).writerow(["a", "b,c", 'd"e'])
print(out.getvalue())
#: dataclasses
from dataclasses import asdict, dataclass, field

@dataclass(order=True, frozen=True)
class Item:
    price: float
    name: str = field(compare=False)
    tags: list = field(default_factory=list, compare=False)

items = sorted([Item(3.5, "pen"), Item(1.25, "clip", ["small"])])
print(items[0], asdict(items[1]))
items[0].price = 1
#: typing
from typing import Generic, Optional, Protocol, TypeVar, get_type_hints
T = TypeVar("T")

class Box(Generic[T]):
    def __init__(self, value: T) -> None:
        self.value = value

def f(x: int, y: Optional[str] = None) -> list[int]:
    return [x]

print(get_type_hints(f), Box[int], Box(3).value)
#: enumerations
from enum import Enum, Flag, IntEnum, auto

class Colour(Enum):
    RED = auto()
    BLUE = auto()

print(Colour.RED, list(Colour), Colour["BLUE"].value, repr(Colour(1)))
Colour("green")
#: pattern_matching
def describe(x):
    match x:
        case []:
            return "empty"
        case [a, *rest] if len(rest) > 1:
            return f"starts with {a}"
        case {"type": kind}:
            return kind
        case int() | float():
            return "number"
        case _:
            return "other"

print([describe(x) for x in ([], [1, 2, 3], {"type": "map"}, 2.5, "s")])
#: generators
def gen():
    received = yield 1
    print("received", received)
    yield from range(2, 4)
    return "done"

g = gen()
print(next(g), g.send("hi"), list(g), sum(x for x in range(10) if x % 2))
next(g)
#: walrus_and_star
if (n := len("hello")) > 3:
    first, *middle, last = "hello"
    print(n, first, middle, last, {**{"a": 1}, "b": 2}, [*range(3), *"ab"])
#: closures
def counter():
    n = 0
    def step():
        nonlocal n
        n += 1
        return n
    return step

c = counter()
print(c(), c(), [f() for f in [lambda: i for i in range(3)]])
#: decorators
import functools

def trace(f):
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        print("call", f.__name__, args, kwargs)
        return f(*args, **kwargs)
    return wrapper

@trace
def add(a, b=1):
    return a + b

print(add(2, b=3), functools.reduce(lambda a, b: a * b, range(1, 6)))
#: classes
class Animal:
    def __init__(self, name):
        self.name = name
    def __repr__(self):
        return f"{type(self).__name__}({self.name!r})"

class Dog(Animal):
    @property
    def sound(self):
        return "Woof"

d = Dog("Rex")
print(d, d.sound, isinstance(d, Animal), Dog.__mro__)
d.missing
#: context_managers
from contextlib import contextmanager, redirect_stdout, suppress
import io

@contextmanager
def tag(name):
    print(f"<{name}>")
    try:
        yield name
    finally:
        print(f"</{name}>")

with tag("b") as t, suppress(ZeroDivisionError):
    print(t)
    1 / 0
buffer = io.StringIO()
with redirect_stdout(buffer):
    print("hidden")
print(repr(buffer.getvalue()))
#: exceptions
try:
    int("twelve")
except ValueError as error:
    print("caught", error)
else:
    print("never")
finally:
    print("finally")
#: chained_exceptions
class Problem(Exception):
    pass

def load(text):
    try:
        return {"a": 1}[text]
    except KeyError as error:
        raise Problem(f"no {text}") from error

load("b")
#: exception_in_handler
try:
    1 / 0
except ZeroDivisionError:
    undefined_name
#: exception_group
raise ExceptionGroup("several", [ValueError("a"), TypeError("b")])
#: exception_notes
error = ValueError("x")
error.add_note("look here")
raise error
#: assertion
def mean(xs):
    assert xs, "no data"
    return sum(xs) / len(xs)

print(mean([1, 2]))
mean([])
#: name_error_suggestion
value = 3
print(valeu)
#: type_errors
def f(a, b):
    return a + b

try:
    f(1)
except TypeError as error:
    print(error)
"2" + 2
#: index_error
rows = [[1, 2], [3, 4]]
print(rows[1][1])
print(rows[2][0])
#: attribute_error_suggestion
[1, 2].push(3)
#: syntax_error
def f(:
    pass
#: unclosed_bracket
print("start")
x = (1 + 2
y = 3
#: indentation_error
def f():
return 1
#: tabs_and_spaces
if True:
        print(1)
	print(2)
#: python_two
print "hello"
#: unterminated_string
print("hello)
#: invalid_character
print(“hello”)
#: return_outside
return 5
#: await_outside
await something()
#: markdown_fence
```python
print(1)
```
#: syntax_warning
x = 5
if x is 5:
    print("five")
#: import_error
import no_such_module_at_all
#: from_import_error
from math import squareroot
#: exit_code
import sys
print("before")
sys.exit(0)
print("after")
#: exit_message
import sys
sys.exit("something went wrong")
#: quit
print("bye")
quit()
print("never")
#: keyboard_interrupt
raise KeyboardInterrupt
#: input
name = input("What is your name? ")
print("Hello", name)
#: standard_input
import sys
print(repr(sys.stdin.read()), sys.stdin.isatty())
#: standard_error
import sys
print("one")
print("two", file=sys.stderr)
sys.stdout.write("three\n")
sys.stderr.write("four\n")
#: no_newline
print("no newline", end="")
#: mixed_unfinished_lines
import sys
print("a", end="")
print("b", end="", file=sys.stderr)
print("c")
#: printing_bytes
import sys
sys.stdout.flush()
sys.stdout.buffer.write(b"bytes \xe2\x82\xac\n")
sys.stdout.buffer.flush()
print("text")
#: print_options
print(1, 2, 3, sep=", ", end="!\n")
print()
print(*[[1, 2], [3, 4]], sep="\n")
#: pretty_print
from pprint import pprint
pprint({"numbers": list(range(20)), "squares": {i: i * i for i in range(12)}}, width=60)
#: a_lot_of_output
for i in range(300):
    print(i, i * i)
#: main_guard
def main():
    print("main ran", __name__)

if __name__ == "__main__":
    main()
#: expression_without_print
2 + 2
#: globals_of_main
x = 1
print(sorted(k for k in globals() if not k.startswith("__")), __name__)
#: exec_and_eval
exec("z = 3 + 4")
print(z, eval("z ** 2", {"z": 10}))
eval("1 +")
#: compile_and_ast
import ast
print(ast.dump(ast.parse("x + 1", mode="eval")), ast.literal_eval("[1, (2, 3)]"))
#: inspect_signature
import inspect

def f(a, *args, b=2, **kwargs):
    "Say nothing."

print(inspect.signature(f), inspect.getdoc(f))
#: inspect_source
import inspect

def area(r):
    return 3.14 * r * r

print(inspect.getsource(area))
#: help
help(abs)
#: traceback_module
import traceback

def inner():
    return [][1]

try:
    inner()
except IndexError:
    traceback.print_exc()
print("went on")
#: warning
import warnings
warnings.warn("careful")
print("after")
#: deprecation_warning
import warnings

def old():
    warnings.warn("old() is old", DeprecationWarning, stacklevel=2)

old()
#: warnings_as_errors
import warnings
warnings.simplefilter("error")
warnings.warn("now fatal", RuntimeWarning)
#: logging
import logging
logging.warning("seen")
logging.info("not seen")
logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(message)s")
logging.getLogger("x").error("also seen")
#: threads
import threading
results = []
def work(n):
    results.append(n * n)
threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
for t in threads:
    t.start()
for t in threads:
    t.join()
print(sorted(results))
#: exception_in_a_thread
import threading
def work():
    raise ValueError("in a thread")
t = threading.Thread(target=work, name="worker")
t.start()
t.join()
print("main goes on")
#: thread_pool
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    print(list(pool.map(lambda n: n**2, range(6))))
#: locks_and_queues
import queue
import threading
q = queue.Queue()
lock = threading.Lock()
def produce():
    for i in range(3):
        with lock:
            q.put(i)
threading.Thread(target=produce).start()
print([q.get(timeout=5) for _ in range(3)])
#: asynchronous
import asyncio

async def work(n):
    await asyncio.sleep(0.01 * n)
    return n * 10

async def main():
    print(await asyncio.gather(*(work(n) for n in (3, 1, 2))))

asyncio.run(main())
#: asynchronous_timeout
import asyncio

async def main():
    try:
        await asyncio.wait_for(asyncio.sleep(5), 0.01)
    except TimeoutError:
        print("timed out")

asyncio.run(main())
#: file_round_trip
from pathlib import Path
Path("data.txt").write_text("line 1\nline 2\n")
with open("data.txt", "a") as f:
    f.write("líne 3\n")
print(open("data.txt").read().splitlines(), Path("data.txt").stat().st_size)
#: file_not_found
with open("missing.csv") as f:
    print(f.read())
#: temporary_file
import os
import tempfile
with tempfile.NamedTemporaryFile("w+") as f:
    f.write("x" * 10)
    f.seek(0)
    print(len(f.read()))
with tempfile.TemporaryDirectory() as d:
    print(os.listdir(d))
#: directories
import os
os.makedirs("a/b")
open("a/b/c.txt", "w").close()
print([(sorted(ds), sorted(fs)) for _, ds, fs in os.walk("a")], os.path.exists("a/b/c.txt"))
os.rename("a/b/c.txt", "a/d.txt")
os.remove("a/d.txt")
os.rmdir("a/b")
print(os.listdir("a"))
#: glob_and_shutil
import glob
import shutil
for name in "ab":
    open(f"{name}.txt", "w").write(name * 3)
shutil.copy("a.txt", "c.txt")
print(sorted(glob.glob("*.txt")), open("c.txt").read(), os.getcwd() if "os" in globals() else "-")
#: sqlite
import sqlite3
db = sqlite3.connect(":memory:")
db.execute("create table t (x integer)")
db.executemany("insert into t values (?)", [(i,) for i in range(5)])
print(db.execute("select sum(x), avg(x) from t").fetchone())
#: hashing
import base64
import hashlib
import zlib
print(hashlib.sha256(b"abc").hexdigest(), base64.b64encode(b"hello"), zlib.crc32(b"abc"))
print(zlib.decompress(zlib.compress(b"x" * 100)) == b"x" * 100)
#: pickling
import pickle

class P:
    def __init__(self, x):
        self.x = x

print(pickle.loads(pickle.dumps([P(3), {"a": (1, 2)}]))[0].x)
#: copying
import copy
a = [[1], [2]]
b, c = copy.copy(a), copy.deepcopy(a)
a[0].append(9)
print(b, c)
#: struct_and_arrays
import array
import struct
print(struct.pack("<IhB", 1, -2, 3), struct.unpack("<f", b"\0\0\x80?"), array.array("d", [1, 2.5]))
#: operator_module
import operator
print(sorted([{"a": 2}, {"a": 1}], key=operator.itemgetter("a")), operator.add(1, 2))
#: sorting
words = ["banana", "apple", "fig", "cherry"]
print(sorted(words), sorted(words, key=len, reverse=True))
print(max(words, key=len), list(zip(words, range(2))))
words.sort(key=lambda w: (-len(w), w))
print(words, list(enumerate(words, 1))[:2], any([0, ""]), all([]))
#: string_constants
import string
print(string.ascii_lowercase, string.punctuation, string.Template("$a-$b").substitute(a=1, b=2))
#: binary_and_bases
print(bin(10), hex(255), oct(8), int("ff", 16), int("1010", 2), ~5, 5 ^ 3, 1 << 20)
print((300).to_bytes(2))
#: roman_numerals
def roman(n):
    table = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"),
             (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]
    out = ""
    for value, letters in table:
        while n >= value:
            out, n = out + letters, n - value
    return out

print([roman(n) for n in (1994, 2024, 49)])
#: n_queens
def queens(n, row=0, cols=(), d1=(), d2=()):
    if row == n:
        return 1
    return sum(queens(n, row + 1, (*cols, c), (*d1, row + c), (*d2, row - c)) for c in range(n)
               if c not in cols and row + c not in d1 and row - c not in d2)

print([queens(n) for n in range(1, 7)])
#: finaliser_error
class Noisy:
    def __del__(self):
        raise ValueError("in del")

Noisy()
print("still here")
#: exit_handler
import atexit
atexit.register(print, "at exit")
print("body")
#: stack_frames
import sys
def who():
    return sys._getframe(1).f_code.co_name, sys._getframe(0).f_lineno
def caller():
    return who()
print(caller())
#: sizes_and_versions
import sys
print(sys.version_info[:2], sys.maxsize, sys.byteorder, sys.getrecursionlimit(), sys.platform)
#: interpreter_streams
import sys
print(sys.stdout.encoding, sys.stderr.encoding, sys.getdefaultencoding(), sys.stdout.isatty())
#: environment_variables
import os
print(os.environ.get("API_KEY"), os.getenv("HOME") == os.path.expanduser("~"), "PATH" in os.environ)
#: unused_result_of_map
print(map(str, [1]).__class__, range(10)[2:8:2], type(None), NotImplemented, ...)
#: numpy_arrays
import numpy as np
a = np.arange(12).reshape(3, 4)
print(a, a.sum(axis=0), a.T.shape, a[a % 2 == 0], a.mean(), a.dtype)
#: numpy_linear_algebra
import numpy as np
A = np.array([[2.0, 1.0], [1.0, 3.0]])
print(np.linalg.solve(A, [3, 5]), np.linalg.det(A), np.linalg.inv(A))
print(np.linalg.eigvalsh(A), A @ A)
#: numpy_random
import numpy as np
rng = np.random.default_rng(0)
print(rng.integers(0, 10, 5), rng.normal(size=2))
np.random.seed(1)
print(np.random.rand(2))
#: numpy_warning
import numpy as np
print(np.array([1.0, 0.0]) / np.array([0.0, 0.0]))
#: numpy_singular
import numpy as np
np.linalg.inv(np.zeros((2, 2)))
#: numpy_shapes
import numpy as np
np.array([1, 2, 3]) + np.array([1, 2])
#: numpy_roots
import numpy as np
print(np.round(np.sort(np.roots([1, -6, 11, -6])), 6), np.polyfit([0, 1, 2], [1, 3, 7], 2).round(6))
#: numpy_printing
import numpy as np
np.set_printoptions(precision=3, suppress=True)
print(np.linspace(0, 1, 5), np.eye(2), np.array(["a", "b"]), np.float64(1.5), repr(np.float64(1.5)))
print(np.zeros((30, 50)))
#: numpy_memory
import numpy as np
np.zeros((10**6, 10**6))
#: numpy_matrix_power
import numpy as np
print(np.linalg.matrix_power(np.array([[1, 1], [1, 0]], dtype=object), 90)[0, 1])
#: numpy_simulation
import numpy as np
rng = np.random.default_rng(7)
dice = rng.integers(1, 7, size=(100000, 2)).sum(axis=1)
print(np.bincount(dice)[2:], (dice == 7).mean())
#: sympy_solve
from sympy import Eq, solve, symbols
x, y = symbols("x y")
print(solve(x**2 - 5 * x + 6, x), solve([Eq(x + y, 10), Eq(x - y, 2)], [x, y]))
print(solve(x**3 - 2, x))
#: sympy_calculus
import sympy as sp
x = sp.symbols("x")
print(sp.diff(sp.sin(x) * sp.exp(x), x), sp.integrate(sp.exp(-x**2), (x, -sp.oo, sp.oo)))
print(sp.limit(sp.sin(x) / x, x, 0), sp.series(sp.cos(x), x, 0, 6))
print(sp.summation(1 / x**2, (x, 1, sp.oo)))
#: sympy_simplify
from sympy import *
x = symbols("x", positive=True)
print(simplify(sin(x)**2 + cos(x)**2), factor(x**4 - 1), expand((x + 1)**5), apart(1 / (x**2 - 1)))
print(sqrt(8), Rational(3, 6))
print(nsimplify(0.333333333333333, rational=True), trigsimp(2*sin(x)*cos(x)))
#: sympy_numbers
from sympy import factorint, isprime, nextprime, primerange, totient, divisors, N, pi, E
print(factorint(2024), isprime(2**61 - 1), nextprime(10**6), list(primerange(10, 30)))
print(totient(100), divisors(36), N(pi, 40), E.evalf(20))
#: sympy_matrices
from sympy import Matrix, symbols
a = symbols("a")
M = Matrix([[1, 2], [3, a]])
print(M.det(), M.inv(), M.eigenvals(), Matrix([[1, 2], [2, 4]]).rank())
#: sympy_inequality
from sympy import S, Symbol, reduce_inequalities, solveset, solve_univariate_inequality
x = Symbol("x", real=True)
print(solveset(x**2 < 4, x, S.Reals), reduce_inequalities([x > 1, x < 3], x))
#: sympy_pretty
from sympy import Integral, init_printing, latex, pprint, sqrt, symbols
x = symbols("x")
init_printing()
pprint(Integral(sqrt(1 / x), x))
print(latex(Integral(sqrt(1 / x), x)))
#: sympy_parse
from sympy import sympify, parse_expr
print(sympify("2*x + 3*x"), parse_expr("x**2 + 2*x + 1").subs("x", 3))
sympify("2*x +")
#: sympy_geometry
from sympy import Point, Triangle, Circle
t = Triangle(Point(0, 0), Point(4, 0), Point(0, 3))
print(t.area, t.perimeter, t.incircle.radius, t.circumcircle.center)
#: sympy_diophantine
from sympy.ntheory.modular import crt
from sympy import mod_inverse, gcdex
print(crt([3, 5, 7], [2, 3, 2]), mod_inverse(3, 11), gcdex(12, 18))
#: sympy_not_solvable
from sympy import symbols, solve, cos
x = symbols("x")
solve(cos(x) - x, x)
#: sympy_equation
import sympy
n = sympy.symbols("n", integer=True)
print(sympy.rsolve(sympy.Function("y")(n + 1) - 2 * sympy.Function("y")(n), sympy.Function("y")(n)))
#: scipy_optimize
from scipy.optimize import brentq, linprog, minimize
print(round(brentq(lambda x: x**3 - 2, 0, 2), 8), minimize(lambda v: (v[0] - 3)**2, [0]).x.round(4))
r = linprog([-1, -2], A_ub=[[1, 1]], b_ub=[4], bounds=[(0, None), (0, 3)])
print(r.x, r.fun)
#: scipy_integrate
from scipy.integrate import quad, solve_ivp
import numpy as np
print(round(quad(lambda x: np.exp(-x**2), -np.inf, np.inf)[0], 8))
print(solve_ivp(lambda t, y: -y, (0, 1), [1.0], rtol=1e-8).y[0, -1].round(6))
#: scipy_statistics
from scipy import stats
print(stats.norm.cdf(1.96).round(6), stats.binom.pmf(3, 10, 0.5).round(6))
print(stats.t.ppf(0.975, 9).round(4))
#: scipy_special
from scipy import linalg, special
print(special.gamma(5), special.comb(10, 3, exact=True), linalg.lu([[2, 1], [1, 3]])[1])
#: pandas
import pandas as pd
df = pd.DataFrame({"name": ["Ann", "Bob", "Cy"], "age": [30, 25, 35], "city": ["X", "Y", "X"]})
print(df, df.groupby("city")["age"].mean(), df.describe(), sep="\n")
#: matplotlib
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import os
plt.plot([1, 2, 3], [1, 4, 9])
plt.title("Squares")
plt.savefig("plot.png")
print(os.path.getsize("plot.png") > 1000)
#: matplotlib_show
import matplotlib.pyplot as plt
plt.figure()
plt.bar(["a", "b"], [1, 2])
plt.show()
print("shown")
#: current_directory
import os
print(os.getcwd())
#: own_file
print(__file__)
#: arguments
import sys
print(sys.argv)
#: shell
import os
print(os.system("echo from the shell"))
#: subprocess
import subprocess
print(subprocess.run(["echo", "hello"], capture_output=True, text=True).stdout)
#: install_a_package
import subprocess
import sys
subprocess.check_call([sys.executable, "-m", "pip", "--version"])
#: multiprocessing
from multiprocessing import Pool

def square(n):
    return n * n

if __name__ == "__main__":
    with Pool(2) as pool:
        print(pool.map(square, range(4)))
#: fork
import os
if os.fork() == 0:
    os._exit(0)
os.wait()
print("forked")
#: network
import urllib.request
urllib.request.urlopen("http://127.0.0.1:9/", timeout=2)
#: socket
import socket
s = socket.socket()
s.bind(("127.0.0.1", 0))
print("bound")
#: system_files
print(open("/etc/passwd").read() != "")
#: other_directories
import os
print("etc" in os.listdir("/"))
#: write_elsewhere
with open("/tmp/left-by-a-snippet.txt", "w") as f:
    print(f.write("x"))
import os
os.remove("/tmp/left-by-a-snippet.txt")
"""

SNIPPETS: dict[str, str] = {
    name: code for name, code in re.findall(r"^#: (\w+)\n(.*?)(?=^#: |\Z)", _TEXT, re.M | re.S)
}

PROCESSES = "one process per execution: no fork, no exec"
NETWORK = "no sockets but pairs"
FILES = "only the standard library, installed packages and the own directory"

QUOTED = "CPython prints this one itself, and can quote lines of files only"

DIFFERENT: dict[str, tuple[str, str]] = {
    "recursion_limit": (
        "a few frames are the sandbox's own",
        "more times]\nRecursionError",
    ),
    "name_error_suggestion": (
        "the traceback module suggests none before 3.12",
        "NameError",
    ),
    "mixed_unfinished_lines": ("streams are buffered by line, as in a terminal", "ac\nb"),
    "exception_in_a_thread": (QUOTED, "ValueError: in a thread\nmain goes on\n"),
    "finaliser_error": (QUOTED, "ValueError: in del\nstill here\n"),
    "current_directory": ("each execution has a directory of its own", "/"),
    "own_file": ("the code comes from no file", "NameError: name '__file__' is not defined"),
    "arguments": ("there is no command line", "['']"),
    "lone_surrogate": (
        "shown escaped instead of raising",
        "\\ud800",
    ),
    "shell": (PROCESSES, ""),
    "subprocess": (PROCESSES, "PermissionError"),
    "install_a_package": (PROCESSES, "PermissionError"),
    "multiprocessing": (PROCESSES, "Error"),
    "fork": (PROCESSES, "PermissionError"),
    "network": (NETWORK, "Error"),
    "socket": (NETWORK, "PermissionError"),
    "system_files": (FILES, "Error: [Errno"),
    "other_directories": (FILES, "Error: [Errno"),
    "write_elsewhere": (FILES, "Error: [Errno"),
}
