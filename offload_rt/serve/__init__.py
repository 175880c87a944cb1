"""The server: the OpenAI protocol in front of one engine, whose sweeps serve everybody.

FastAPI, uvicorn and sse-starlette are in the extra `serve`; only `app`, `wire` and `running` import
them.
"""
