# Completion of emupmem for bash. Made by: emupmem completion bash
_emupmem() {
	local line now words=() added i
	# bash splits words at = and : too; here they are one.
	for ((i = 1; i <= COMP_CWORD; i++)); do
		line=${COMP_WORDS[i]}
		if [[ $line == [=:]* || ($i -gt 1 && ${COMP_WORDS[i - 1]} == [=:]) ]] && ((${#words[@]})); then
			words[${#words[@]} - 1]+=$line
		else
			words+=("$line")
		fi
	done
	now=${words[${#words[@]} - 1]}
	now=${now//[\\\'\"]/}
	words[${#words[@]} - 1]=$now
	COMPREPLY=()
	while IFS= read -r line; do
		case $line in
		@files) compopt -o filenames && mapfile -t COMPREPLY < <(compgen -f -- "${now#*=}") ;;
		@folders) compopt -o filenames && mapfile -t COMPREPLY < <(compgen -d -- "${now#*=}") ;;
		*)
			printf -v added %q "${line%%$'\t'*}" # 1G!4G would be a word of the history
			[[ $now == *:* ]] && added=${added#"${now%:*}:"}
			COMPREPLY+=("$added")
			;;
		esac
	done < <(sh -c @WORDS@ emupmem "${words[@]}")
}
complete -F _emupmem emupmem
