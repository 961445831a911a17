"""Numbers of patch embedding and its inverse: every case, dtype and backend against the float64 reference."""

import pytest
from support import DTYPES, on_backends, skip_unless_runs

from vdcore.testing import cases_of, check


@on_backends(cases_of("patchify", "unpatchify"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_case(case, backend, dtype):
    skip_unless_runs(case, backend, dtype, requires_grad=True)
    check(case, backend, dtype)
