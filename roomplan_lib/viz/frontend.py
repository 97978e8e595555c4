"""Whether somebody looks at this notebook while it runs."""

from __future__ import annotations

import os


def live_frontend() -> bool:
    """Whether a Jupyter server started this kernel for an open document, so that widgets have somebody to talk to.

    Servers say so to their kernels by JPY_SESSION_NAME; papermill, nbconvert and `jupyter execute` do not. A widget
    made under those would never be seen, and its state (megabytes) would be stored in the executed notebook.
    """
    return "JPY_SESSION_NAME" in os.environ
