"""A kernel as one straight list of instructions: calls are inlined."""

from __future__ import annotations

from .syntax import Fault, Instruction, Mem, Minus, Not, Pair, Reg, Symbol, Vec


class Program:
    """A kernel with all calls inlined: `code` (branch targets are indices), `registers`, `variables`."""

    def __init__(self, module, kernel):
        self.module, self.kernel = module, kernel
        self.code, self.registers, self.variables = [], [], []
        self.copies = 0
        self._used: set[str] | None = None
        self._inline(kernel, {}, None, ())

    def _inline(self, f, rename, end_fixups, stack):
        if f.name in stack:
            raise Fault(f"recursive call of {f.name} is not supported")
        if f.body is not None and not f.code:
            f.body.parse()
        base = len(self.registers)
        self.registers += f.registers
        self.copies += 1
        local = dict(rename)
        for space, align, name, size in f.variables:
            unique = f"{name}@{self.copies}" if stack and space != "shared" else name
            local[name] = unique
            if not any(v[2] == unique for v in self.variables):
                self.variables.append((space, align, unique, size))

        def fix(o):
            if isinstance(o, Reg):
                return Reg(o.index + base, o.type)
            if isinstance(o, Symbol):
                return Symbol(local.get(o.name, o.name))
            if isinstance(o, Mem):
                return Mem(fix(o.base), o.offset)
            if isinstance(o, Vec):
                return Vec(tuple(fix(x) for x in o.items))
            if isinstance(o, Not):
                return Not(fix(o.item))
            if isinstance(o, Minus):
                return Minus(fix(o.item))
            if isinstance(o, Pair):
                return Pair(fix(o.first), fix(o.second))
            return o

        where, branches = [], []
        for instruction in f.code:
            where.append(len(self.code))
            new = instruction.copy()
            new.pred = fix(instruction.pred) if instruction.pred is not None else None
            if instruction.op == "call":
                name, returned, given = instruction.args
                callee = self.module.functions.get(name)
                if callee is None:
                    raise Fault(f"line {instruction.line}: indirect call or unknown function {name}")
                if callee.body is None:  # extern: vprintf, __assertfail, malloc ...
                    new.args = (name, tuple(fix(x) for x in returned), tuple(fix(x) for x in given))
                    self.code.append(new)
                    continue
                skip = None
                if new.pred is not None:
                    skip = Instruction("bra", (), (), instruction.line, instruction.text, new.pred, not new.negate)
                    self.code.append(skip)
                names = {p[0]: fix(x).name for p, x in zip(callee.params, given, strict=False)}
                names.update({p[0]: fix(x).name for p, x in zip(callee.returns, returned, strict=False)})
                ends = []
                self._inline(callee, names, ends, stack + (f.name,))
                for e in ends:
                    e.target = len(self.code)
                if skip:
                    skip.target = len(self.code)
                continue
            if instruction.op == "ret" and end_fixups is not None:
                new = Instruction("bra", (), (), instruction.line, instruction.text, new.pred, instruction.negate)
                end_fixups.append(new)
            elif instruction.op in ("bra", "brx"):
                branches.append(new)
            new.args = tuple(fix(x) for x in instruction.args)
            self.code.append(new)
        where.append(len(self.code))
        for b in branches:
            b.target = [where[x] for x in b.target] if b.op == "brx" else where[b.target]

    def used_symbols(self) -> set[str]:
        """Names that the code's operands mention."""
        if self._used is None:
            self._used = set()

            def walk(operand):
                if hasattr(operand, "name"):
                    self._used.add(operand.name)
                for part in ("base", "item", "first", "second"):
                    if hasattr(operand, part):
                        walk(getattr(operand, part))
                for item in getattr(operand, "items", ()):
                    walk(item)

            for instruction in self.code:
                for operand in instruction.args:
                    if not isinstance(operand, (str, tuple)):
                        walk(operand)
        return self._used
