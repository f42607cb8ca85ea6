"""How loops are compiled for the CPU by Numba, for all modules that hold some."""

import numba


def compilers(math: set[str]):
    """Two decorators under the floating-point liberties `math` (LLVM's fast-math flags): compiled, and inlined.

    What is inlined is compiled anew at each call, so that constant arguments are constants to the compiler: short loops
    over a vector of known length are vectorized whole, over one of unknown length they fall into the scalar remainder.
    """
    common = {"fastmath": math, "nogil": True, "error_model": "numpy"}
    return numba.njit(cache=True, **common), numba.njit(inline="always", **common)
