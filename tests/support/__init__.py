"""What the tests share and is no test itself, imported as `support.NAME`."""
