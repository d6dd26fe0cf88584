"""Running a finished artifact: with transformers' `generate`, in a chat, on a web page, or behind a server."""
