"""The browser that gpt-oss was trained on, over sources that the user names: a folder, a ZIM file, the web.

`browser.Browser` is the tool. `documents.Documents`, `zim.Zim` and `web.Web` are sources; `content` says what one is,
and `sources.open_sources` makes them of what a user typed.
"""
