"""Alembic's scripts; `database.Database.migrate` runs them."""
