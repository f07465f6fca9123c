"""A load generator for OpenAI-compatible servers: ``python -m loadgen`` and ``memserve-loadgen``.

Pure cores: ``workload`` (what is asked), ``formats`` and ``generated`` (where it comes from), ``arrivals``
(when), ``conversation`` and ``content`` (prompts), ``wire`` and ``answer`` (bytes to tokens), ``measures``
and ``compare`` (records to statistics). Shells around them: ``client`` and ``runner`` (trio), ``terminal``,
``rundir``, ``report``. Programs start at ``api``; people at ``docs/benchmarking.md``.
"""
