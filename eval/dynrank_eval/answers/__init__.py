"""Reading and comparing answers from first principles, for the protocols `dynrank-*` and `chat-v2`.

The protocols of papers have rules of their own (`dynrank_eval.extraction`, `dynrank_eval.transcriptions`).
"""
