"""
Let a language model describe the look of classes.

    python examples/describe_classes.py \
        --class_names names.txt \
        --domain "a species of bird" \
        --llm Qwen/Qwen2.5-7B-Instruct \
        --output descriptions.json

`names.txt` has one class name a line. The result is for `--descriptions` of `examples/adapt.py`. The model runs on
this machine: 15.2 GB are downloaded, for a GPU with 16 to 24 GB of memory. `Qwen/Qwen2.5-1.5B-Instruct` (3.1 GB) also
runs on a CPU, slowly. Without a model, write the file by hand, like `examples/descriptions.json`, or paste the prompt
of `docs/descriptions.md` into any chat. `--base_url http://localhost:8000/v1` asks a model behind an OpenAI-compatible
endpoint (vLLM, TGI, llama.cpp, Ollama, hosted ones), whose key is read from the environment variable OPENAI_API_KEY.
After an interruption the same command goes on; `--help` lists every setting.
"""

from microclip_hf.commands.describe import main


if __name__ == "__main__":
    main()
