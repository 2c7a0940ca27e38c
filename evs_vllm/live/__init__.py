# SPDX-License-Identifier: Apache-2.0
"""Live video: a camera or a file as a chat with a vLLM server, chunk by chunk.

``evs-vllm live`` is the command. Data goes one way::

    source.Player      frames of a camera, a URL or a file at even distances, as JPEG; a broken source is opened again
    chunks.Chunker     frames to chunks, chunks to turns
    mailbox.Mailbox    from the thread that reads to the one that asks: where that one is slow, the latest turn wins
    chat.Conversation  turns to the messages of a request whose beginning never changes
    client.Client      asks; a server that is gone is waited for, a full context is explained
    report.Report      a line or a JSON object a turn, and the summary
    session.watch      all of it, until the source ends or somebody presses Ctrl-C

Only `source` needs OpenCV, which is in the extra ``live``.
"""

INSTALL = 'pip install "evs-vllm[live]"'
