"""How stored weights learn."""
