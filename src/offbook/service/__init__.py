"""What the arena and the rating service stand on: a database, files by their hash, one shape of refusal, pages, a port.

`database` and `storage` keep things, `refusal` says no, `web` dresses an application, `serving` opens its port, `pages`
draws. Nothing here knows what is kept or shown.
"""
