"""What people type from habit of other tools, and what to use here instead.

Names are those of llama.cpp, ollama, mlx-lm, vLLM, ExLlama with TabbyAPI, and transformers. What
means the same here under the same name is an option of ours and not in this list.
"""

_FIT = "--device-memory 20GiB limits it, and left out what is free is used"
_KV_TYPE = "keys and values keep the model's number format; --kv host or --kv disk moves them"
_SAMPLERS = "--temperature, --top-k, --top-p and --min-p are the samplers there are"
_HISTORY = f"tokens are drawn without regard to earlier ones; {_SAMPLERS}"
_DRAFT = "--draft MODEL names who drafts, --draft-tokens N how much"
_FORMAT = "a model is run in the format of its files; --dtype sets the number format of computing"
_ONE_DEVICE = "a run uses one device; --device cuda:N chooses it"
_READS = "weights go past the page cache, so there is nothing to set; --home host keeps them in RAM"
_CHAT = "leave it out: offload-run MODEL talks on a terminal, with a prompt it answers once"
_CHUNK = "leave it out: prompts go through each layer in chunks, weights cross the link once"

# Options, several of one meaning in a line.
_OPTIONS = {
    "-ngl --n-gpu-layers --gpu-layers --num-gpu": "use --resident-layers N, layers kept on the "
    "device; left out, as many as fit stay there",
    "-ncmoe --n-cpu-moe --cpu-moe -cmoe -ot --override-tensor": "use "
    "--expert-slots N, experts kept in memory; left out, as many as fit stay there",
    "--gpu-memory-utilization --mem-fraction-static": f"use --device-memory with a size: {_FIT}",
    "--max-memory --gpu-memory -fit --fit": f"use --device-memory: {_FIT}",
    "--cpu-offload-gb --swap-space": "use --device-memory: what does not fit is streamed",
    "--max-model-len --max-seq-len --max-kv-size --num-ctx --n-ctx -cs --cache-size": "use "
    "--context N",
    "--max-new-tokens --predict --n-predict --num-predict": "use -n N or --max-tokens N",
    "--n-keep --keep --context-shift --rope-scaling --rope-scale --yarn-orig-ctx": "the context "
    "is never shifted or stretched beyond what config.json says; --context N sets memory aside",
    "--tensor-parallel-size -tp --pipeline-parallel-size -pp -ts --tensor-split": _ONE_DEVICE,
    "-sm --split-mode -mg --main-gpu -gs --gpu-split --device-map -dev --rpc": _ONE_DEVICE,
    "--data-parallel-size -dp --nnodes": _ONE_DEVICE,
    "--kv-cache-dtype -ctk -ctv --cache-type-k --cache-type-v -cq --cache-quant": _KV_TYPE,
    "--cache-mode --kv-bits --kv-group-size --quantized-kv-start": _KV_TYPE,
    "-nkvo --no-kv-offload": "use --kv host",
    "-fa --flash-attn --attention-backend": "leave it out: the fastest exact attention is chosen",
    "--enforce-eager --compilation-config": "leave it out: nothing is compiled",
    "-b --batch-size -ub --ubatch-size --max-num-batched-tokens --prefill-step-size": _CHUNK,
    "--max-num-seqs -np --parallel": "prompts are answered one after the other; see bench",
    "--mlock --no-mmap --mmap --direct-io -dio --numa": _READS,
    "--quantization --load-in-4bit --load-in-8bit --load-format -bits --bits": _FORMAT,
    "-hf --hf-repo -hff --hf-file -mu --model-url --repo": "give the hub id as MODEL, org/name",
    "--model-path --model-dir -model --model-name --path": "give the folder or hub id as MODEL",
    "--tokenizer --chat-template --chat-template-file --jinja --tokenizer-mode": "the model "
    "folder's own tokenizer and template are used; --raw leaves the template out",
    "--chat-template-config --chat-template-kwargs --think --reasoning-format": "templates are "
    "rendered without arguments; --raw takes a prompt that you rendered yourself",
    "--ignore-chat-template --no-chat-template -no-cnv --no-conversation": "use --raw",
    "-sys --system-prompt --sys --system-prompt-file -sysf": "use --system TEXT",
    "--trust-remote-code": "code of a model folder is never run; families that transformers has "
    "need none",
    "-cnv --conversation -i --interactive -if --interactive-first --keepalive": _CHAT,
    "--repeat-penalty --repetition-penalty --repeat-last-n --no-repeat-ngram-size": _HISTORY,
    "--presence-penalty --frequency-penalty --dry-multiplier --logit-bias": _HISTORY,
    "--mirostat --mirostat-lr --typical --typical-p --tfs --samplers --xtc-probability": _SAMPLERS,
    "--sampling-seq --dynatemp-range --top-nsigma --xtc-threshold --epsilon-cutoff": _SAMPLERS,
    "--do-sample": "use --temperature above 0, or --sampling model",
    "--generation-config": "use --sampling model",
    "--num-beams --best-of --beam-width": "one answer is drawn; --temperature 0 takes the "
    "likeliest token always",
    "--grammar --grammar-file --json-schema -j --guided-json --guided-regex": "answers are not "
    "constrained; --json is about how they are printed",
    "-md --model-draft --draft-model --assistant-model --speculative-model": _DRAFT,
    "--speculative-config --spec-type --spec-draft-model": _DRAFT,
    "--draft-max --draft-n --draft-min --num-draft-tokens --num-speculative-tokens": "use "
    "--draft-tokens N",
    "--draft-p-min --draft-p-split --confidence-threshold": "leave it out: how much is drafted "
    "is measured and corrected while running",
    "-ngld --gpu-layers-draft --n-gpu-layers-draft -devd": "a draft model is on the device whole",
    "--lora --lora-path --adapter-path --enable-lora --lora-scaled": "use --adapter FOLDER",
    "--uds --listen": "`offload-run serve` listens; generate --json answers programs",
    "--format --output-format --log-format": "use --json",
    "--no-display-prompt --verbose-prompt --special --color -co": "leave it out: stdout holds the "
    "answer and nothing else",
    "--log-disable --no-perf --simple-io --nowordwrap --log-level": "use -q: nothing on stderr "
    "but errors",
    "--file -bf --binary-file": "use -f FILE or --prompt-file FILE",
    "--prompts-file --dataset --dataset-name --num-prompts": "bench takes --prompts FILE",
    "--ctx --context-size --context-length --max-position-embeddings": "use --context N",
    "--gpu --device-id --gpus": "use --device cuda:N",
    "--cpu --no-cuda --device-type": "use --device cpu",
    "--mmproj --image --audio --multimodal": "only text goes in and comes out",
    "--threads-batch -tb --cpu-range --cpu-mask -C --prio": "use -t N or --threads N",
    "--prompt-cache --prompt-cache-file --prompt-cache-all --slot-save-path": "nothing is kept "
    "between runs",
    "--stop-token --stop-words --reverse-prompt -r --extra-eos-token": "use --stop TEXT",
    "--echo": "leave it out: the prompt is not repeated",
    "--no-download --offline --local-files-only": "leave it out: nothing is downloaded unasked",
    "--download-dir --cache-dir --hf-cache-dir": "set HF_HUB_CACHE to the folder",
    "--revision --code-revision --branch": "write org/name@revision as MODEL",
    "--timings --show-timings --perf": "leave it out: timings are on stderr after each answer",
    "--insecure --hidethinking": "leave it out",
}

# Verbs that are not there.
_VERBS = {
    "server openai api start up webui": "use `offload-run serve MODEL`",
    "run-batch batch-generate offline": "use `offload-run batch MODEL --input FILE --output FILE`",
    "ps stop kill status": "nothing stays loaded between runs; `offload-run doctor` says what is "
    "free",
    "pull get fetch download install add": "`offload-run ORG/NAME --download` fetches a model "
    "into the hub's cache first",
    "list ls models": "MODEL is a folder, or an id in the hub's cache, which `hf cache ls` lists",
    "show info inspect describe": "`offload-run plan MODEL` shows its sizes and what would live "
    "where",
    "rm remove delete prune": "`hf cache rm` removes models of the hub's cache, folders are yours",
    "create modelfile": "--system, --temperature and others are options; `offload-run config` says "
    "where their defaults are kept",
    "push cp copy publish": "models are folders and ids of the hub's cache; copy those",
    "quantize quant quantise convert export merge fuse": "models are run as they are; "
    "--draft-weights int8 rounds copies that only draft",
    "cli llama main ask answer query complete infer": "use `offload-run MODEL PROMPT`",
    "talk conversation interactive": "use `offload-run chat MODEL`",
    "embed embedding embeddings rerank score perplexity ppl eval evaluate": "only text is made "
    "here: `generate`, `chat` and `bench`",
    "benchmark perf speed throughput latency": "use `offload-run bench MODEL --prompts FILE`, or "
    "`plan` and `simulate` for predictions",
    "train finetune fine-tune lora": "`offload-run train-medusa` trains heads that draft; models "
    "are not trained",
    "login logout signin signout auth": "there are no accounts; `hf auth login` is the hub's",
    "tokenize tokenise detokenize": "`generate --json` has the answer's token ids",
    "version": "use `offload-run --version`",
    "update upgrade self-update": "update it as you installed it",
    "settings options set defaults": "use `offload-run config`",
    "completions autocomplete": "use `offload-run completion bash`",
    "check test diagnose env collect-env": "use `offload-run doctor`",
    "estimate predict fit": "use `offload-run plan MODEL`, or `simulate` for another machine",
}


def _by_word(table: dict[str, str]) -> dict[str, str]:
    return {word: advice for words, advice in table.items() for word in words.split()}


OPTIONS, VERBS = _by_word(_OPTIONS), _by_word(_VERBS)


def option_advice(name: str) -> str | None:
    """What to use here instead of another tool's option, with one dash or two."""
    plain = name.lstrip("-").replace("_", "-")
    dashes = ("--", "-")
    if not name.startswith("--"):
        plain, dashes = plain.rstrip("0123456789"), ("-", "--")  # -ngl20
    found = (OPTIONS.get(dash + plain) for dash in dashes)
    return next((advice for advice in found if advice), None)


def verb_advice(word: str) -> str | None:
    """What to use here instead of another tool's verb."""
    return VERBS.get(word.lower())
