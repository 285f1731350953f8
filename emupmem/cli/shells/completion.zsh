#compdef emupmem
# Completion of emupmem for zsh. Made by: emupmem completion zsh
_emupmem() {
	local line
	local -a found
	for line in "${(@f)$(sh -c @WORDS@ emupmem "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}")}"; do
		[[ $PREFIX == --*=* ]] && compset -P '*='
		case $line in
		@files) _files ;;
		@folders) _files -/ ;;
		?*) found+=("${${line%%$'\t'*}//:/\\:}${${line#*$'\t'}:+:${line#*$'\t'}}") ;;
		esac
	done
	((${#found})) && _describe -V emupmem found
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _emupmem "$@"; else compdef _emupmem emupmem; fi
