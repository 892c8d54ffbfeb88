"""Triton's interpreter, without work that it repeats for every call inside of a kernel."""

import functools
import sys
import types


def be_quick() -> None:
    """Let the interpreter replace the functions of ``triton.language`` once a launch.

    It does so again for every function that a kernel calls, without effect, which takes a third of
    the time of the tests that run in it. Does nothing before Triton is imported, and the second
    time.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    tl = interpreter.tl

    @functools.wraps(interpreter._patch_lang)
    def patch(function):
        modules = [m for m in function.__globals__.values() if isinstance(m, types.ModuleType)]
        if any(tl.core.is_builtin(m.load) for m in modules if m in (tl, tl.core)):
            return patch.__wrapped__(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch
