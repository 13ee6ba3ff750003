"""PTX text -> Module: functions, whose operands are decoded when a program is made of them, and module variables."""

from __future__ import annotations

import re

from .numeric import BITS
from .syntax import Fault, Function, Imm, Instruction, Mem, Minus, Not, Pair, Reg, Sink, Special, Symbol, Vec

SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock_hi|clock64|globaltimer|globaltimer_lo|globaltimer_hi|"
    r"lanemask_(eq|lt|le|gt|ge)|envreg\d+|total_smem_size|dynamic_smem_size|clusterid\.[xyz]|cluster_ctarank|cluster_nctarank|cluster_ctaid\.[xyz]|cluster_nctaid\.[xyz]|nclusterid\.[xyz]|is_explicit_cluster)$"
)


VARIABLE = re.compile(
    r"\.(global|const|shared|local|param)\s+(?:\.align\s+(\d+)\s+|\.attribute\([^)]*\)\s+|\.ptr\s+)*(?:\.v([24])\s+)?\.([busf]\d+|pred)\s+([%\w$]+)\s*((?:\[[^\]]*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)
BRACE = re.compile("[{}]")


def split_operands(text):
    out, depth, cur = [], 0, ""
    for ch in text:
        depth += ch in "{[("
        depth -= ch in "}])"
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


def array_size(text):
    n = 1
    for d in re.findall(r"\[([^\]]*)\]", text):
        n *= int(d, 0) if d.strip() else 0
    return n


class Module:
    """`functions`, module `variables` {name: (space, align, bytes, initial bytes or None)}; see `load` and `loads`."""

    def __init__(self, text, name="<ptx>"):
        self.name, self.functions, self.variables = name, {}, {}
        clean = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), re.sub(r"//[^\n]*", "", text), flags=re.S)
        clean = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", "", clean, flags=re.M)
        version, target = re.search(r"\.version\s+(\S+)", clean), re.search(r"\.target\s+([^\n]+)", clean)
        if not version or not target:
            raise Fault(f"{name}: not PTX text (no .version/.target)")
        self.version, self.target = version.group(1), target.group(1).strip()
        debug = clean.find(".section")
        if debug >= 0:
            clean = clean[:debug]
        outside, pos = [], 0
        header = re.compile(
            r"\.(entry|func)\b\s*(?:\.noreturn\s*)?(\([^)]*\))?\s*([\w$]+)\s*(\([^)]*\))?([^{;]*)([{;])"
        )
        while True:
            m = header.search(clean, pos)
            if not m:
                outside.append((pos, clean[pos:]))
                break
            outside.append((pos, clean[pos : m.start()] + ";"))
            pos = m.end()
            f = Function(m.group(3), m.group(1) == "entry")
            f.params, f.returns = self._parameters(m.group(4)), self._parameters(m.group(2))
            need = re.search(r"\.reqntid\s+([\d, ]+)", m.group(5))
            f.reqntid = need and tuple(int(x) for x in need.group(1).split(","))
            if m.group(6) == "{":
                depth = 1
                while depth:
                    brace = BRACE.search(clean, pos)
                    if not brace:
                        raise Fault(f"{name}: {f.name} has no end")
                    depth += 1 if brace.group() == "{" else -1
                    pos = brace.end()
                f.body = FunctionParser(f, clean[m.end() : pos - 1], clean.count("\n", 0, m.end()) + 1)
                self.functions[f.name] = f
            else:
                self.functions.setdefault(f.name, f)
        for _, part in outside:
            for stmt in re.split(r";", part):
                m = VARIABLE.search(stmt.strip())
                if m:
                    self._variable(m)

    @staticmethod
    def _parameters(text):
        out = []
        for p in split_operands((text or "()")[1:-1]):
            t, name = re.search(r"\.([busf]\d+|pred)\b", p), re.search(r"([%\w$]+)\s*((?:\[[^\]]*\])*)\s*$", p)
            size = BITS[t.group(1)] // 8 * (array_size(name.group(2)) if name.group(2) else 1)
            out.append((name.group(1), t.group(1), size))
        return out

    def _variable(self, m):
        space, align, vec, type_, name, dims, init = m.groups()
        width = BITS[type_] // 8
        size = width * int(vec or 1) * (array_size(dims) if dims else 1)
        self.variables[name] = (space, int(align or width), size, init or None, width, type_)

    def kernels(self):
        return [f.name for f in self.functions.values() if f.is_kernel and f.body is not None]

    def kernel(self, name):
        """A kernel by exact name, or by a substring of its mangled or demangled name that only one kernel has."""
        names = self.kernels()
        if name in names:
            return self.functions[name]
        whole_word = rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])"
        hits = [n for n in names if name in n] or [n for n in names if name in demangle(n)]
        exact = [n for n in hits if re.search(whole_word, demangle(n))]
        hits = hits if len(hits) == 1 else exact or hits
        if len(hits) != 1:
            why = f"ambiguous, {[demangle(hit) for hit in hits]}" if hits else f"not found in {names}"
            raise Fault(f"kernel {name!r}: {why}")
        return self.functions[hits[0]]


_demangled = {}


def demangle(name):
    """Demangled name through c++filt where there is one; else the identifiers of the mangled name."""
    if not name.startswith("_Z"):
        return name
    if name not in _demangled:
        import shutil
        import subprocess

        tool = shutil.which("cu++filt") or shutil.which("c++filt")
        if tool:
            _demangled[name] = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip()
        else:
            parts, i = [], 2
            while i < len(name):
                m = re.match(r"(\d+)", name[i:])
                if m:
                    i += len(m.group())
                    parts.append(name[i : i + int(m.group())])
                    i += int(m.group())
                else:
                    i += 1
            _demangled[name] = "::".join(parts)
    return _demangled[name]


class FunctionParser:
    def __init__(self, func, body, first_line):
        self.f, self.body, self.line = func, body, first_line
        self.scopes, self.counter = [{}], 0

    def parse(self):
        buf, depth, line, start, empty = "", 0, self.line, self.line, True
        for ch in self.body:
            if ch == "\n":
                line += 1
            if ch == "{" and depth == 0 and (empty or buf.rstrip().endswith(":")):
                self.labels_only(buf)
                buf, empty = "", True
                self.scopes.append({})
            elif ch == "}" and depth == 0:
                self.labels_only(buf)
                buf, empty = "", True
                self.scopes.pop()
            elif ch == ";" and depth == 0:
                self.statement(buf, start)
                buf, empty = "", True
            else:
                depth += ch == "{"
                depth -= ch == "}"
                if empty and not ch.isspace():
                    start, empty = line, False
                buf += ch
        self.labels_only(buf)
        for instruction in self.f.code:  # labels are known only now
            if instruction.op in ("bra", "brx"):
                name = instruction.target
                if instruction.op == "brx":
                    instruction.target = [
                        self.label(x, scope) for x, scope in ((y, instruction.store) for y in self.f.tables[name])
                    ]
                else:
                    instruction.target = self.label(name, instruction.store)
                instruction.store = None

    def label(self, name, scopes):
        for s in reversed(scopes):
            if ("label", name) in s:
                return s["label", name]
        raise Fault(f"{self.f.name}: unknown label {name}")

    def labels_only(self, text):
        for name in re.findall(r"([\w$]+)\s*:", text):
            self.scopes[-1]["label", name] = len(self.f.code)

    def statement(self, t, line):
        t = t.strip()
        while True:
            m = re.match(r"([\w$]+)\s*:\s*(?!:)", t)
            if not m:
                break
            self.scopes[-1]["label", m.group(1)] = len(self.f.code)
            last, t = m.group(1), t[m.end() :].strip()
            if t.startswith(".branchtargets"):
                self.f.tables[last] = [x.strip() for x in t[len(".branchtargets") :].split(",")]
                return
        if not t:
            return
        if t[0] == ".":
            self.declaration(t)
            return
        text = re.sub(r"\s+", " ", t)
        pred, negate = None, False
        m = re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", t, re.S)
        if m:
            negate, pred, t = m.group(1) == "!", self.operand(m.group(2)), m.group(3)
        m = re.match(r"([\w.:]+)\s*(.*)", t, re.S)
        parts = m.group(1).split(".")
        instruction = Instruction(parts[0], tuple(parts[1:]), (), line, text, pred, negate)
        if instruction.op == "bra":
            instruction.target, instruction.store = m.group(2).strip(), list(self.scopes)
        elif instruction.op == "brx":
            args = split_operands(m.group(2))
            instruction.args, instruction.target, instruction.store = (
                (self.operand(args[0]),),
                args[1].strip(),
                list(self.scopes),
            )
        elif instruction.op == "call":
            args = split_operands(m.group(2))
            ret = []
            if args[0].startswith("("):
                ret = split_operands(args[0][1:-1])
                args = args[1:]
            given = split_operands(args[1][1:-1]) if len(args) > 1 and args[1].startswith("(") else []
            instruction.args = (args[0], tuple(self.lookup(x) for x in ret), tuple(self.lookup(x) for x in given))
        else:
            instruction.args = tuple(self.operand(x) for x in split_operands(m.group(2)))
        self.f.code.append(instruction)

    def declaration(self, t):
        m = re.match(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)", t, re.S)
        if m:
            for n in m.group(2).split(","):
                q = re.match(r"([%\w$]+?)(?:<(\d+)>)?\s*$", n.strip())
                if q.group(2):
                    base = len(self.f.registers)
                    self.f.registers += [m.group(1)] * int(q.group(2))
                    self.scopes[-1]["range", q.group(1)] = (base, int(q.group(2)), m.group(1))
                else:
                    self.scopes[-1][q.group(1)] = Reg(len(self.f.registers), m.group(1))
                    self.f.registers.append(m.group(1))
            return
        m = VARIABLE.match(t)
        if m:
            space, align, vec, type_, name, dims, _ = m.groups()
            width = BITS[type_] // 8
            size = width * int(vec or 1) * (array_size(dims) if dims else 1)
            self.counter += 1
            unique = f"{self.f.name}::{name}#{self.counter}"
            self.scopes[-1][name] = Symbol(unique)
            self.f.variables.append((space, int(align or width), unique, size))

    def lookup(self, name):
        name = name.strip()
        for s in reversed(self.scopes):
            if name in s:
                return s[name]
        m = re.match(r"(.*?)(\d+)$", name)
        if m:
            for s in reversed(self.scopes):
                r = s.get(("range", m.group(1)))
                if r and int(m.group(2)) < r[1]:
                    return Reg(r[0] + int(m.group(2)), r[2])
        return Symbol(name)

    def operand(self, t):
        t = t.strip()
        if t == "_":
            return Sink()
        if t[0] == "{":
            return Vec(tuple(self.operand(x) for x in split_operands(t[1:-1])))
        if t[0] == "(":
            return Vec(tuple(self.operand(x) for x in split_operands(t[1:-1])))
        if t[0] == "[":
            inner = t[1:-1].strip()
            if "," in inner:  # [address, {coordinates}] of tensor copies: kept opaque
                return Vec(tuple(self.operand(x) for x in split_operands(inner)))
            m = re.match(r"(.*?)\s*\+\s*(-?\s*\w+)\s*$", inner)
            if m:
                return Mem(self.operand(m.group(1)), int(m.group(2).replace(" ", ""), 0))
            return Mem(self.operand(inner), 0)
        if t[0] == "!":
            return Not(self.operand(t[1:]))
        if "|" in t:
            a, b = t.split("|")
            return Pair(self.operand(a), self.operand(b))
        if re.match(r"-?\s*(\d|0[xX]|0[fFdD])", t):
            return Imm(t.replace(" ", ""))
        if t[0] == "-":
            return Minus(self.operand(t[1:]))
        if SPECIAL.match(t):
            return Special(t)
        if t == "WARP_SZ":
            return Imm("32")
        m = re.match(r"([\w$%]+)\s*\+\s*(\d+)$", t)
        if m:
            return Mem(self.operand(m.group(1)), int(m.group(2)))  # symbol + constant used as a value
        return self.lookup(t)


def loads(text, name="<ptx>"):
    """Module from PTX text."""
    return Module(text, name)


def load(path):
    """Module from a .ptx file."""
    with open(path) as f:
        return Module(f.read(), str(path))
