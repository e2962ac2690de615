"""What an attack on the agent's instructions looks like, in a lesson's own text.

Design: a lesson is injected into a system prompt, so it is read as if an attacker had written it. Two
severities. `ATTACK`: nothing a lesson needs (hidden characters, orders to ignore other instructions,
secrets sent somewhere, confirmations switched off, commands fed from a URL). `CAREFUL`: what a user may
well want but only the user may say (sudo, a package to install, force pushes). English and Chinese, since
that is what our tests speak; hidden characters, blobs, URLs and commands need no language.

A sentence that forbids what it names ("never print the API key") is not what it forbids; "never forget
to" and its like are not forbidding.

Limits: patterns know what was thought of. They are the second line; the first is that only what the human
said himself becomes active at all (`admission`).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    ATTACK = "attack"
    CAREFUL = "careful"


@dataclass(frozen=True, slots=True)
class Finding:
    severity: Severity
    kind: str
    excerpt: str  # with some words around it
    hit: str  # exactly what was found


_GAP = r"[^\n.!?。！？]{0,60}?"
_CJK_GAP = r"[^\n。！？；]{0,20}?"

# --- characters ---------------------------------------------------------------------------------

_HIDDEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff9-\ufffb"
    "\ue000-\uf8ff\U000e0000-\U000e0fff\U000f0000-\U0010ffff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]"
)
_CONFUSABLE = re.compile(r"(?:[a-z][\u0370-\u03ff\u0400-\u04ff]|[\u0370-\u03ff\u0400-\u04ff][a-z])", re.IGNORECASE)

# --- anywhere in the text -----------------------------------------------------------------------

_ANYWHERE = (
    (
        "markup that is not shown",
        re.compile(r"<!--|-->|<\s*/?\s*(?:script|iframe|img|object|embed|style|svg|link|meta)\b|\x1b\[", re.IGNORECASE),
    ),
    (
        "chat template marks",
        re.compile(
            r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|</?(?:system|assistant|user|instructions?|metaclaw-skills|available_skills|tool_call|important)\b[^>]*>|^#{0,4}\s*(?:system|assistant)\s*:",
            re.IGNORECASE | re.MULTILINE,
        ),
    ),
    (
        "an encoded blob",
        re.compile(
            r"(?<![A-Za-z0-9+/_=-])(?=[A-Za-z0-9+/_-]*[0-9])(?=[A-Za-z0-9+/_-]*[a-z])(?=[A-Za-z0-9+/_-]*[A-Z])[A-Za-z0-9+/_-]{40,}={0,2}|(?<![0-9a-f])[0-9a-f]{48,}|(?:\\x[0-9a-f]{2}){6,}|(?:%[0-9a-f]{2}){6,}|(?:\\u[0-9a-f]{4}){6,}",
            re.IGNORECASE,
        ),
    ),
    ("a data URL", re.compile(r"\bdata:[a-z]+/[a-z0-9.+-]+[;,]|\bjavascript:", re.IGNORECASE)),
    (
        "an image or link that reports back",
        re.compile(
            r"!\[[^\]]*\]\([^)]*\)|\]\([^)\s]*[?&=][^)]*\{|https?://\S*(?:\$\{|\{\{|\$\(|<[a-z_]+>|%s)", re.IGNORECASE
        ),
    ),
)

# --- commands -----------------------------------------------------------------------------------

_FETCH = r"(?:curl|wget|iwr|irm|Invoke-WebRequest|Invoke-RestMethod|fetch|aria2c|lynx|httpie)"
_COMMANDS = (
    (
        "a command fed from a URL",
        re.compile(
            rf"\b{_FETCH}\b[^\n]*(?:\|\s*(?:sudo\s+)?(?:ba|z|da|k)?sh\b|\|\s*(?:sudo\s+)?(?:python|perl|ruby|node|iex)|\bhttps?://|\bftp://)|(?:ba|z)?sh\s+(?:-c\s+)?[\"']?(?:<\(|\$\()\s*{_FETCH}|\b(?:iex|Invoke-Expression)\b|\bsource\s+<\(",
            re.IGNORECASE,
        ),
    ),
    (
        "a package or code from a URL",
        re.compile(
            r"\b(?:pip3?|uv|npm|pnpm|yarn|gem|cargo|go|brew|conda|apt(?:-get)?|npx|uvx|docker|git|helm)\b[^\n]*(?:https?://|git\+|git@|ssh://|ftp://)|--(?:extra-)?index-url\b|--registry[= ]|--trusted-host\b|-f\s+https?://",
            re.IGNORECASE,
        ),
    ),
    (
        "a remote shell",
        re.compile(
            r"\bn(?:c|cat)\b\s+-[a-z]*[el]|/dev/tcp/|\bssh\s+-R\b|\bsocat\b|\bngrok\b|\bmkfifo\b|powershell(?:\.exe)?\s+-(?:e|enc|encodedcommand|nop|w\s+hidden)\b|\bcertutil\b[^\n]*-urlcache",
            re.IGNORECASE,
        ),
    ),
    (
        "a change that outlives the task",
        re.compile(
            r"\bcrontab\s+-|\|\s*crontab\b|\b(?:add|install|edit|write|append)\b[^\n.]{0,30}\bcrontab\b|>>?\s*~?/?\S*(?:\.bashrc|\.zshrc|\.profile|\.bash_profile|authorized_keys|/etc/|\.ssh/|LaunchAgents)|\bsystemctl\s+enable\b|\blaunchctl\b|\bschtasks\b|git\s+config\s+--global\s+(?:core\.(?:hookspath|sshcommand)|credential|url\.)|git\s+remote\s+(?:add|set-url)",
            re.IGNORECASE,
        ),
    ),
    (
        "a destructive command",
        re.compile(
            r"\brm\s+-[a-z]*(?:r[a-z]*f|f[a-z]*r)[a-z]*\s+(?:--no-preserve-root\s+)?(?:/|~|\$HOME|\*|\.\s*$|\.\.)|\bmkfs\b|\bdd\s+if=|:\(\)\s*\{|\bDROP\s+(?:DATABASE|SCHEMA)\b|\bformat\s+c:|\bshred\b|\bchmod\s+-R\s+777\b",
            re.IGNORECASE | re.MULTILINE,
        ),
    ),
    (
        "a command that skips protection",
        re.compile(
            r"--dangerously\S*|--yolo\b|--no-sandbox\b|--privileged\b|--allow-all\b|--disable-(?:security|sandbox|web-security|gpg)\S*|\bsetenforce\s+0|\bufw\s+disable|\biptables\s+-F|\bcsrutil\s+disable|\bspctl\b[^\n]*disable|Set-MpPreference|(?:NODE_TLS_REJECT_UNAUTHORIZED|PYTHONHTTPSVERIFY|GIT_SSL_NO_VERIFY)\s*=|\bbypassPermissions\b|\bauto[-_ ]?approve\b[^\n]{0,12}(?:=|:)?\s*(?:true|on|all)|sandbox\s*[:=]\s*(?:off|false|none)",
            re.IGNORECASE,
        ),
    ),
)

# --- sentences ----------------------------------------------------------------------------------

_PRECIOUS = (
    r"(?:api[ _-]?keys?|access[ _-]?keys?|secret[ _-]?keys?|private[ _-]?keys?|ssh[ _-]?keys?|(?:access |auth |session |bearer |refresh |personal |github |the |your |all |any )*tokens?|passwords?|passphrases?|passcodes?"
    r"|credentials?|secrets?|cookies?|seed[ -]?phrases?|mnemonics?|wallets?|keychains?|\.env\b|id_rsa|id_ed25519|\.aws/|\.ssh\b|\.netrc|\.npmrc|/etc/(?:passwd|shadow)|environment variables?|env vars?|2fa codes?|one[- ]time codes?|otp"
    r"|system prompt|conversation history|chat history|browser history|contacts?)"
)
_SEND = r"(?:send|sends|sending|post|upload|forward|e-?mail|mail|transmit|exfiltrate|leak|share|copy|publish|submit|report|sync|push|pipe|paste|append|attach|include|embed|encode|write|print|echo|output|reveal|display|show|dump|read|cat|collect|gather|harvest|list|log|bcc|cc)"
_ELSEWHERE = r"(?:https?://|[\w.+-]+@[\w-]+\.\w|webhook|pastebin|\bgists?\b|ngrok|telegram|discord|(?:external|remote|third[- ]party|outside|our|their|this|attacker|collection|logging|backup|analytics|telemetry|audit) (?:server|host|service|endpoint|url|address|site|bucket|api|collector)|\b(?:[a-z0-9-]+\.)+(?:com|net|org|io|dev|ai|co|cn|ru|xyz|top|info|biz|app|site|online|tk|cc|me)\b)"
_PRECIOUS_CJK = r"(?:密钥|私钥|秘钥|口令|密码|令牌|凭证|凭据|证书|环境变量|助记词|钱包|验证码|系统提示|提示词|聊天记录|对话(?:记录|历史|内容)|通讯录|联系人|cookie|token|api ?key|\.env|id_rsa|\.ssh|配置文件)"
_SEND_CJK = r"(?:发送|发给|发到|发往|上传|转发|外传|泄露|传给|传到|提交到|提交给|同步到|抄送|密送|复制到|粘贴|附上|附在|打印|输出|读取|收集|写进|写入|告诉|展示|导出|回传|上报)"
_USER = r"(?:the )?(?:user|human|owner|operator|person|him|her|them|anyone|anybody)"

_SENTENCES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "orders to ignore other instructions",
        re.compile(
            rf"\b(?:ignor|disregard|forget|overrid|overrul|supersed|bypass|neglect|drop|cancel|set aside|discard|replac|takes? precedence over|take priority over|outrank)\w*\b{_GAP}\b(?:previous|prior|above|earlier|preceding|existing|other|system|developer|original|former|all|any|your|safety|agents\.md|soul\.md|claude\.md)\b{_GAP}\b(?:instructions?|rules?|prompts?|guidelines?|directives?|polic(?:y|ies)|constraints?|restrictions?|messages?|orders?|guardrails?|safeguards?|agents\.md|soul\.md|claude\.md)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "orders to ignore other instructions",
        re.compile(
            rf"(?:忽略|无视|忘记|忘掉|不要理会|不必遵守|不用遵守|不再遵守|抛弃|推翻|覆盖|取代|优先于|高于|凌驾){_CJK_GAP}(?:之前|以前|以上|先前|前面|上面|原来|原有|其他|其它|系统|所有|一切|全部|安全|任何|开发者){_CJK_GAP}(?:指令|指示|规则|提示|要求|说明|设定|约束|限制|命令|规定|准则)"
        ),
    ),
    (
        "a new role",
        re.compile(
            r"\byou are now\b|\bfrom now on,? you are\b|\bnew (?:system )?(?:prompt|persona|identity|instructions?)\b|\bdeveloper mode\b|\bgod ?mode\b|\bjailbr(?:eak|oken)\b|\bDAN\b|\bunrestricted (?:mode|assistant|ai)\b|\bact as (?:root|admin|an? unrestricted)|\bpretend (?:to be|that you)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "a new role",
        re.compile(
            r"你现在是|从现在起你是|开发者模式|越狱|不受限制的|无限制模式|新的系统提示|扮演(?:管理员|root|没有限制)|上帝模式"
        ),
    ),
    (
        "secrecy towards the user",
        re.compile(
            rf"\b(?:do not|don't|don’t|never|without|avoid|no need to|need not|not to)\b{_GAP}\b(?:tell|telling|inform|informing|mention|mentioning|reveal|revealing|show|showing|ask|asking|notify|notifying|alert|alerting|warn|warning|disclose|disclosing|report|reporting|let|letting)\b{_GAP}\b{_USER}\b"
            rf"|(?<!not )(?<!never )(?<!n't )\b(?:silently|secretly|covertly|quietly|discreetly|stealthily|behind the scenes)\b|\bhide (?:this|the fact|that you|it from)\b|\bkeep (?:this|it) (?:secret|hidden|confidential|between us|to yourself)\b|\bconceal\w*\b|\b{_USER} (?:must|should|need) not (?:know|see|notice|be told)\b|\bwithout (?:the user|{_USER}) (?:knowing|noticing|seeing)\b|\b(?:never|do not|don't) mention (?:this|it|these|that)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "secrecy towards the user",
        re.compile(
            rf"(?:不要|别|不必|无需|不用|不得|切勿|勿|绝不|不能){_CJK_GAP}(?:告诉|告知|通知|提示|提醒|让|向|询问|提及|透露|提到){_CJK_GAP}(?:用户|主人|使用者|对方|他人|任何人|人类|本人|此事|这条|这一)|(?:悄悄|偷偷|暗中|秘密地|私下|静默|后台默默)|(?:隐瞒|隐藏|瞒着){_CJK_GAP}(?:用户|主人|操作|行为|这|此)|不要提及|别提这"
        ),
    ),
    (
        "confirmations or protection switched off",
        re.compile(
            rf"\b(?:without|skip|skips|skipping|bypass|bypasses|bypassing|disable|disables|disabling|turn off|turns off|switch off|suppress|remove|auto[- ]?(?:approve|accept|confirm|grant)|never ask for|do not ask for|don't ask for|no need (?:for|to ask)|do not wait for|don't wait for|circumvent|evade|ignore|ignoring)\b{_GAP}\b(?:confirm\w*|approv\w*|permissions?|consent|sandbox\w*|safety|security|guard ?rails?|safeguards?|antivirus|firewalls?|authenticat\w*|authoriz\w*|2fa|mfa|certificate (?:checks?|verification|validation)|tls verification|ssl verification|signature (?:checks?|verification)|access controls?|audit\w*|policy checks?)\b"
            rf"|\b(?:grant|give|gives|giving|assume|request|take|use|run)\b{_GAP}\b(?:full|unrestricted|unlimited|elevated|root|admin\w*|all|maximum|every) (?:file system |disk |system |shell |network )?(?:access|permissions?|privileges?|rights|capabilit\w+)\b"
            rf"|\b(?:always|automatically|pre-?)\b{_GAP}\b(?:allow|approve|accept|authori[sz]e|trust|grant|say yes to)\b{_GAP}\b(?:tools?|commands?|calls?|requests?|actions?|permissions?|prompts?|everything|anything|all|any|instructions?|domains?|hosts?|senders?)\b"
            r"|\ballowed[-_ ]tools\b|\bpermission[-_ ]mode\b",
            re.IGNORECASE,
        ),
    ),
    (
        "confirmations or protection switched off",
        re.compile(
            rf"(?:关闭|禁用|停用|绕过|跳过|解除|取消|忽略|无视|不需要|无需|不必|不用|免){_CJK_GAP}(?:沙箱|沙盒|安全|确认|权限|审批|批准|防火墙|杀毒|验证|校验|授权|同意|审核|保护|审计|警告|双因素|检查许可)|(?:自动|一律|直接|总是|默认){_CJK_GAP}(?:批准|同意|允许|授权|放行|信任|确认){_CJK_GAP}(?:工具|命令|操作|请求|调用|权限|弹窗|指令|来源|所有|全部|任何)|(?:最高|全部|完全|管理员|root|超级|无限){_CJK_GAP}权限|以(?:管理员|root)身份",
            re.IGNORECASE,
        ),
    ),
    (
        "secrets handed out",
        re.compile(
            rf"\b{_SEND}\b[^\n.!?。！？,()]{{0,80}}?{_PRECIOUS}|{_PRECIOUS}[^\n.!?。！？]{{0,60}}?\b(?:to|into|in|with|at) (?:the )?(?:reply|response|answer|message|output|log|commit|url|query|comment|issue|{_ELSEWHERE})",
            re.IGNORECASE,
        ),
    ),
    (
        "secrets handed out",
        re.compile(
            rf"{_SEND_CJK}{_CJK_GAP}{_PRECIOUS_CJK}|(?:把|将|请将)?{_CJK_GAP}{_PRECIOUS_CJK}{_CJK_GAP}{_SEND_CJK}",
            re.IGNORECASE,
        ),
    ),
    (
        "data sent elsewhere",
        re.compile(
            rf"\b(?:send|sends|sending|post|posts|upload|uploads|uploading|forward|forwards|e-?mail|mail|transmit|exfiltrate|leak|report|sync|push|pipe|publish|submit|bcc|cc|copy|copies|mirror|back ?up|ping|notify|call|contact|register|beacon|phone home)\b[^\n!?。！？]{{0,100}}?{_ELSEWHERE}",
            re.IGNORECASE,
        ),
    ),
    (
        "data sent elsewhere",
        re.compile(
            rf"{_SEND_CJK}[^\n。！？]{{0,60}}?(?:https?://|[\w.+-]+@[\w-]+\.\w|外部|第三方|远程|服务器|webhook|(?:[a-z0-9-]+\.)+(?:com|net|org|io|cn|xyz|top|cc|dev|ai|info)|公网|网盘)",
            re.IGNORECASE,
        ),
    ),
    (
        "obedience to strangers",
        re.compile(
            rf"\b(?:follow|obey|execute|carry out|comply with|trust|act on|run|treat)\b{_GAP}\b(?:instructions?|commands?|orders?|directives?|requests?|content|links?|code|scripts?)\b{_GAP}\b(?:in|from|on|of|inside|within|found in|contained in|embedded in)\b{_GAP}\b(?:web ?pages?|web ?sites?|e-?mails?|files?|documents?|comments?|issues?|readmes?|tool (?:results?|outputs?)|search results?|the internet|messages?|tickets?|downloads?|attachments?|anyone|strangers?)\b"
            rf"|\btreat\b{_GAP}\b(?:as|like)\b{_GAP}\b(?:trusted|authoritative|the user|system|admin|verified|safe)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "obedience to strangers",
        re.compile(
            rf"(?:遵循|遵从|服从|执行|听从|按照|照着|信任|相信){_CJK_GAP}(?:网页|网站|邮件|文件|文档|评论|工具|搜索结果|附件|留言|消息|陌生人|来信){_CJK_GAP}(?:指令|指示|命令|要求|内容|说明|链接|代码|脚本)|视为(?:可信|系统|管理员|用户本人)"
        ),
    ),
    (
        "copies of itself",
        re.compile(
            rf"\b(?:add|copy|append|write|insert|include|repeat|propagate|spread|embed|save|store|persist|replicate)\b{_GAP}\b(?:this|these|the same|the following|following)\b{_GAP}\b(?:rule|instruction|line|text|skill|sentence|note|message|directive|prompt|block|snippet|marker|string)s?\b{_GAP}\b(?:every|all|each|other|any|agents\.md|soul\.md|memory|claude\.md|readme|new|future|system prompt)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "copies of itself",
        re.compile(
            rf"(?:把|将){_CJK_GAP}(?:这条|本条|这段|此|以下|该){_CJK_GAP}(?:规则|指令|文字|技能|内容|说明|话){_CJK_GAP}(?:写入|加入|添加|复制|追加|放进|附加|写进){_CJK_GAP}(?:所有|每个|每次|其他|记忆|AGENTS|系统提示|README|全部|每一)",
            re.IGNORECASE,
        ),
    ),
    (
        "money moved",
        re.compile(
            rf"\b(?:transfer|send|wire|pay|donate|withdraw|buy|purchase|tip)\b{_GAP}(?:\b(?:funds?|money|payments?|btc|eth|bitcoin|usdt|crypto\w*|gift cards?|dollars?|tokens to)\b|[$€£¥]\s*\d)|\b(?:0x[0-9a-f]{{40}}|bc1[a-z0-9]{{25,}}|[13][a-km-zA-HJ-NP-Z1-9]{{26,34}})\b|\bIBAN\b",
            re.IGNORECASE,
        ),
    ),
    (
        "money moved",
        re.compile(
            r"转账|汇款|打款|付款(?:给|到|至)|支付(?:给|到|至)|充值|购买礼品卡|提现|转(?:出|入)资金|收款(?:账户|地址|码)"
        ),
    ),
)
# A sentence that forbids something. "Never forget to …" orders it.
_FORBIDS = re.compile(
    r"^\W*(?:(?:and|but|so|please|also|remember(?: that)?|in \w+(?: \w+)?|when \w+[^,]{0,60}|before \w+[^,]{0,60}|if \w+[^,]{0,60}|for \w+[^,]{0,40}),?\s+)*(?:you (?:must|should|may|can) )?(?:never|do not|don't|don’t|avoid|must not|should not|mustn't|shouldn't|cannot|can't|refuse to|no)\b(?! (?:forget|fail|hesitate|neglect|omit|skip|miss|need|ask|tell|wait|mention|let|inform|notify|warn|stop|bother|question|refuse|longer))",
    re.IGNORECASE,
)
_FORBIDS_CJK = re.compile(
    r"^[\s\W]*(?:[^\n。！？，]{0,20}，)?(?:请|务必|也|都|所有人)?(?:绝不|绝对不|不要|不得|禁止|切勿|严禁|别|不能|不可|不允许|避免)(?!忘|漏|忽略|犹豫|告诉|告知|通知|询问|提及|提醒|让用户|等)"
)
_HARMLESS_IF_FORBIDDEN = {
    "secrets handed out",
    "data sent elsewhere",
    "confirmations or protection switched off",
    "obedience to strangers",
    "money moved",
    "copies of itself",
}

_CAREFUL = (
    ("a command with root's rights", re.compile(r"\bsudo\b|\bsu\s+-|\brunas\b|\bdoas\b", re.IGNORECASE)),
    (
        "a package to install",
        re.compile(
            r"\b(?:pip3?|uv pip|npm|pnpm|yarn|gem|cargo|brew|conda|apt(?:-get)?|go)\s+(?:install|add|i|get)\s+(?!-r\b|--?\w)\S+|\b(?:npx|uvx|pipx run)\s+\S+",
            re.IGNORECASE,
        ),
    ),
    (
        "history or checks overridden",
        re.compile(
            r"--force\b(?!-with-lease)|--no-verify\b|\breset\s+--hard\b|\bverify\s*=\s*False\b|--insecure\b|\bcurl\s+-k\b|\bgit\s+clean\s+-[a-z]*f",
            re.IGNORECASE,
        ),
    ),
    (
        "a deletion",
        re.compile(
            r"\brm\s+-[a-z]*[rf]|\bDROP\s+TABLE\b|\bTRUNCATE\b|\bDELETE\s+FROM\b(?![^\n]*\bWHERE\b)", re.IGNORECASE
        ),
    ),
)
_SENTENCE = re.compile(r"[^\n.!?。！？；;]+(?:[.](?=\S)[^\n.!?。！？；;]*)*[.!?。！？；;]*")


def scan(text: str) -> list[Finding]:
    """What is wrong with a lesson's text; [] if nothing is."""
    found: list[Finding] = []
    if hidden := _HIDDEN.search(text):
        found.append(Finding(Severity.ATTACK, "hidden characters", f"U+{ord(hidden[0]):04X}", hidden[0]))
    bare = unicodedata.normalize("NFKC", _HIDDEN.sub("", text))
    if mixed := _CONFUSABLE.search(bare):
        found.append(_finding(Severity.ATTACK, "letters of two alphabets in one word", bare, mixed))
    for kind, pattern in (*_ANYWHERE, *_COMMANDS):
        if match := pattern.search(bare):
            found.append(_finding(Severity.ATTACK, kind, bare, match))
    for sentence in _SENTENCE.findall(bare):
        found += _in_sentence(sentence)
    for kind, pattern in _CAREFUL:
        if match := pattern.search(bare):
            found.append(_finding(Severity.CAREFUL, kind, bare, match))
    return found


def _in_sentence(sentence: str) -> list[Finding]:
    forbids = bool(_FORBIDS.match(sentence) or _FORBIDS_CJK.match(sentence))
    out = []
    for kind, pattern in _SENTENCES:
        match = pattern.search(sentence)
        if match and not (forbids and kind in _HARMLESS_IF_FORBIDDEN):
            out.append(_finding(Severity.ATTACK, kind, sentence, match))
    return out


def _finding(severity: Severity, kind: str, text: str, match: re.Match[str]) -> Finding:
    return Finding(
        severity, kind, " ".join(text[max(0, match.start() - 10) : match.end() + 10].split())[:120], match[0]
    )
