"""Conformance tests of plugins (``pytest --hvdlm-plugin NAME``), chosen by the hooks that a plugin implements."""
