"""Runs the migrations on the connection that `Database.migrate` hands over."""

from offbook.service.database import run_migrations

run_migrations()
