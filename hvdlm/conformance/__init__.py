"""``pytest --hvdlm-plugin NAME``: the tests that every plugin has to pass, as far as they concern what it provides."""
