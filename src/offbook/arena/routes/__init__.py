"""The arena's HTTP and websocket interface, one file for each kind of visitor."""

from offbook.arena.routes import accounts, blobs, pages, studies, submissions, trials

ROUTERS = (accounts.router, submissions.router, trials.router, blobs.router, studies.router, pages.router)
