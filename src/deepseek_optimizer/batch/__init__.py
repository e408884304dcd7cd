"""Batch jobs: files of requests in the format of OpenAI's Batch API, answered by the routes of the server without HTTP."""
