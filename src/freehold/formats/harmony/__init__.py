"""Harmony, the format that gpt-oss speaks: https://github.com/openai/harmony/blob/main/docs/format.md"""
