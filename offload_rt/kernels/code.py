"""LLVM's language written piece by piece: numbered values, loops, and bf16 in registers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LANES = 16  # 32-bit numbers in a register
WIDE, NARROW = f"<{LANES} x float>", f"<{LANES} x i16>"
FUSED = "@llvm.fma.v16f32"  # to be declared
_WHOLE = f"<{LANES} x i32>"


class Code:
    """A function being written.

    Args:
        head: its name and arguments, as `@name(ptr %record)`.
        internal: nobody outside the module calls it.
    """

    def __init__(self, head: str, *, internal: bool = True) -> None:
        scope = "internal " if internal else ""
        self._lines = [f"define {scope}void {head} #0 {{", "entry:"]
        self._block, self._count = "entry", 0

    def text(self) -> str:
        """The whole function."""
        return "\n".join([*self._lines, " ret void", "}", ""])

    def add(self, line: str) -> None:
        """An instruction without a value."""
        self._lines.append(f" {line}")

    def let(self, expression: str) -> str:
        """An instruction with a value; returns its name."""
        self._count += 1
        self.add(f"%v{self._count} = {expression}")
        return f"%v{self._count}"

    @property
    def here(self) -> str:
        """The block that is being written."""
        return self._block

    def block(self, name: str) -> None:
        """Begin a block; what ended the one before says how it is reached."""
        self._lines.append(f"{name}:")
        self._block = name

    @contextmanager
    def loop(self, start: str | int, stop: str | int, step: int = 1) -> Iterator[str]:
        """Repeat what is written inside for numbers from `start`, below `stop`; maybe never."""
        self._count += 1
        before, name, index = self._block, f"loop{self._count}", f"%i{self._count}"
        self.add(f"br label %{name}")
        self.block(name)
        self.add(f"{index} = phi i64 [{start}, %{before}], [{index}.next, %{name}.next]")
        self.add(f"{index}.in = icmp ult i64 {index}, {stop}")
        self.add(f"br i1 {index}.in, label %{name}.body, label %{name}.end")
        self.block(f"{name}.body")
        yield index
        self.add(f"br label %{name}.next")
        self.block(f"{name}.next")
        self.add(f"{index}.next = add i64 {index}, {step}")
        self.add(f"br label %{name}")
        self.block(f"{name}.end")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """What is written inside is for when a condition holds."""
        self._count += 1
        name = f"when{self._count}"
        self.add(f"br i1 {condition}, label %{name}, label %{name}.end")
        self.block(name)
        yield
        self.add(f"br label %{name}.end")
        self.block(f"{name}.end")

    def fields(self, record: str, names: str) -> list[str]:
        """Load fields of a record, addresses and numbers (which begin with `n_`), in order."""
        found = []
        for place, name in enumerate(names.split()):
            kind = "i64" if name.startswith("n_") else "ptr"
            at = self.let(f"getelementptr i64, ptr {record}, i64 {place}")
            found.append(self.let(f"load {kind}, ptr {at}"))
        return found

    def at(self, start: str, offset: str | int, kind: str = "i16") -> str:
        """The address of a number."""
        return self.let(f"getelementptr {kind}, ptr {start}, i64 {offset}")

    def plus(self, one: str | int, other: str | int) -> str:
        """The sum of whole numbers."""
        return self.let(f"add i64 {one}, {other}")

    def times(self, one: str | int, other: str | int) -> str:
        """The product of whole numbers."""
        return self.let(f"mul i64 {one}, {other}")

    def some(self, count: str, begin: str, most: int) -> str:
        """How many of so many are taken at once, from one of them on."""
        left = self.let(f"sub i64 {count}, {begin}")
        return self.let(f"call i64 @llvm.umin.i64(i64 {left}, i64 {most})")

    def my_share(self, count: int | str) -> tuple[str, str]:
        """Which of so many parts are this thread's: first, and one after the last."""
        thread = self.let(f"sext i32 {self.let('call i32 @omp_get_thread_num()')} to i64")
        threads = self.let(f"sext i32 {self.let('call i32 @omp_get_num_threads()')} to i64")
        first = self.let(f"udiv i64 {self.times(thread, count)}, {threads}")
        after = self.times(self.plus(thread, 1), count)
        return first, self.let(f"udiv i64 {after}, {threads}")

    @contextmanager
    def taken(self, counter: str, count: int | str) -> Iterator[str]:
        """Repeat for parts that this thread takes from a counter which all share, until it is up.

        So a thread whose core was lent to another's work for a moment does not hold up the rest.
        """
        self._count += 1
        name = f"take{self._count}"
        self.add(f"br label %{name}")
        self.block(name)
        part = self.let(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        left = self.let(f"icmp ult i64 {part}, {count}")
        self.add(f"br i1 {left}, label %{name}.body, label %{name}.end")
        self.block(f"{name}.body")
        yield part
        self.add(f"br label %{name}")
        self.block(f"{name}.end")

    @contextmanager
    def taken_ahead(self, counter: str, count: int | str) -> Iterator[tuple[str, str]]:
        """As `taken`, a part ahead: repeat for a part and the one that this thread takes next.

        The next may be none: a number from `count` on.
        """
        self._count += 1
        before, name = self._block, f"take{self._count}"
        first = self.let(f"atomicrmw add ptr {counter}, i64 1 monotonic")
        self.add(f"br label %{name}")
        self.block(name)
        part, following = f"%{name}.part", f"%{name}.next"
        self.add(f"{part} = phi i64 [{first}, %{before}], [{following}, %{name}.done]")
        left = self.let(f"icmp ult i64 {part}, {count}")
        self.add(f"br i1 {left}, label %{name}.body, label %{name}.end")
        self.block(f"{name}.body")
        self.add(f"{following} = atomicrmw add ptr {counter}, i64 1 monotonic")
        yield part, following
        self.add(f"br label %{name}.done")
        self.block(f"{name}.done")
        self.add(f"br label %{name}")
        self.block(f"{name}.end")

    def read(self, address: str) -> str:
        """`LANES` bf16 numbers as fp32."""
        narrow = self.let(f"load {NARROW}, ptr {address}, align 2")
        wide = self.let(f"zext {NARROW} {narrow} to {_WHOLE}")
        high = self.let(f"shl {_WHOLE} {wide}, splat (i32 16)")
        return self.let(f"bitcast {_WHOLE} {high} to {WIDE}")

    def rounded(self, value: str) -> str:
        """fp32 rounded to bf16 and widened again, as torch rounds: to even, tiny numbers kept."""
        bits = self.let(f"bitcast {WIDE} {value} to {_WHOLE}")
        odd = self.let(
            f"and {_WHOLE} {self.let(f'lshr {_WHOLE} {bits}, splat (i32 16)')}, splat (i32 1)"
        )
        up = self.let(f"add {_WHOLE} {bits}, {self.let(f'add {_WHOLE} {odd}, splat (i32 32767)')}")
        cut = self.let(f"and {_WHOLE} {up}, splat (i32 -65536)")
        none = self.let(f"fcmp uno {WIDE} {value}, zeroinitializer")
        kept = self.let(
            f"select <{LANES} x i1> {none}, {_WHOLE} splat (i32 2143289344), {_WHOLE} {cut}"
        )
        return self.let(f"bitcast {_WHOLE} {kept} to {WIDE}")

    def write(self, value: str, address: str) -> None:
        """Store what was rounded as bf16."""
        bits = self.let(f"bitcast {WIDE} {value} to {_WHOLE}")
        high = self.let(f"lshr {_WHOLE} {bits}, splat (i32 16)")
        narrow = self.let(f"trunc {_WHOLE} {high} to {NARROW}")
        self.add(f"store {NARROW} {narrow}, ptr {address}, align 2")

    def fp(self, operation: str, one: str, other: str) -> str:
        """`fadd`, `fmul` and so on of registers."""
        return self.let(f"{operation} {WIDE} {one}, {other}")

    def fused(self, one: str, other: str, third: str) -> str:
        """One x other + third of registers, rounded once."""
        return self.let(f"call {WIDE} {FUSED}({WIDE} {one}, {WIDE} {other}, {WIDE} {third})")

    def spread(self, number: str, kind: str = "float") -> str:
        """A register with one number of 32 bits in all places."""
        wide = f"<{LANES} x {kind}>"
        first = self.let(f"insertelement {wide} poison, {kind} {number}, i32 0")
        return self.let(f"shufflevector {wide} {first}, {wide} poison, {_WHOLE} zeroinitializer")

    def spread_long(self, number: str) -> str:
        """As many places with one number of 64 bits."""
        wide = f"<{LANES} x i64>"
        first = self.let(f"insertelement {wide} poison, i64 {number}, i32 0")
        return self.let(f"shufflevector {wide} {first}, {wide} poison, {_WHOLE} zeroinitializer")


def turned(code: Code, rows: Sequence[str]) -> list[str]:
    """The columns of 16 vectors of 16."""
    for _ in range(4):  # each pair of vectors is merged lane by lane; after four times they lie so
        pairs = list(zip(rows[:8], rows[8:], strict=True))
        rows = [
            mixed(code, one, other, [at for n in range(start, start + 8) for at in (n, 16 + n)])
            for one, other in pairs
            for start in (0, 8)
        ]
    return list(rows)


def mixed(code: Code, one: str, other: str, lanes: Sequence[int], kind: str = _WHOLE) -> str:
    """Lanes of two vectors; those of the other are counted on."""
    order = ", ".join(f"i32 {lane}" for lane in lanes)
    return code.let(f"shufflevector {kind} {one}, {kind} {other}, <{len(lanes)} x i32> <{order}>")
