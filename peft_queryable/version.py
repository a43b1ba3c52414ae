"""The version of this package, which the build reads from here, and the command that installs it."""

__version__ = "0.1.0"
# For model cards. There is no package index to install from yet; docs/releasing.md says when to change it.
INSTALL = f"pip install peft_queryable-{__version__}-py3-none-any.whl"
