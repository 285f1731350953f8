# Words that may come next, one a line with a tab before what they mean; @files or @folders where it is a file.
# Given are the words after "emupmem", the last one as far as it is typed. For sh, which each Tab starts: it uses
# nothing but its own commands, and grep.
tab=$(printf "\t.")
tab=${tab%.}
end="
"
root=${EMUPMEM_COMPLETION_ROOT:-}
gib=1073741824

@TABLE@

# The machine: what is there -----------------------------------------------------------------------------------

first_line() { # FILE: its first line is `line`
	line=
	[ -r "$1" ] && IFS= read -r line <"$1"
}

tight() { # BYTES, as people type them
	if [ $(($1 % gib)) = 0 ]; then echo "$(($1 / gib))G"
	elif [ $(($1 % 1048576)) = 0 ]; then echo "$(($1 / 1048576))M"
	else echo "$1"; fi
}

usable() { # each usable range above 4 GiB: START SIZE
	for folder in "$root"/sys/firmware/memmap/*/; do
		first_line "${folder}type"
		[ "$line" = "System RAM" ] || continue
		first_line "${folder}start"
		start=$((line))
		first_line "${folder}end"
		end=$((line + 1))
		[ "$start" -ge $((4 * gib)) ] || start=$((4 * gib))
		[ "$end" -gt "$start" ] && echo "$start $((end - start))"
	done
}

up_to() { # MOST: sizes from 512M on, doubled, and the largest one in whole GiB
	size=$((gib / 2))
	while [ "$size" -le "$1" ]; do
		last=$size
		tight "$size"
		size=$((size * 2))
	done
	whole=$(($1 / gib * gib))
	if [ "$whole" -gt "${last:-0}" ]; then tight "$whole"; fi
}

largest() { # the largest number of the second words of standard input
	most=0
	while read -r _ size; do
		[ "$size" -gt "$most" ] && most=$size
	done
	echo "$most"
}

ram() { # bytes of RAM of this machine
	while read -r name size _; do
		[ "$name" = MemTotal: ] && echo $((size * 1024))
	done <"$root/proc/meminfo"
}

pmem() { # devices of persistent memory
	for folder in "$root"/sys/block/pmem*/; do
		[ -d "$folder" ] || continue
		first_line "${folder}size"
		name=${folder%/}
		echo "/dev/${name##*/}$tab$((line / 2048)) MiB"
	done
}

mounted() { # folders where persistent memory is mounted; one with odd letters in its name is left out
	while read -r source folder _; do
		case $source$folder in
		/dev/pmem*\\*) ;;
		/dev/pmem*) echo "$folder$tab$source" ;;
		esac
	done <"$root/proc/self/mounts"
}

reservations() { # items of memmap= that reserve, of this boot and of the next
	grep -hos "memmap=[^ \"']*" "$root/proc/cmdline" "$root/etc/default/grub" "$root"/etc/default/grub.d/*.cfg \
		"$root/etc/kernel/cmdline" "$root/boot/grub/grub.cfg" |
		while IFS="=," read -r _ a b c d _; do
			for item in "$a" "$b" "$c" "$d"; do
				case $item in *!*) echo "$item" ;; esac
			done
		done
}

bus() { # PREFIX: names on the bus of libnvdimm
	for folder in "$root"/sys/bus/nd/devices/"$1"*/; do
		[ -d "$folder" ] || continue
		name=${folder%/}
		first_line "${folder}size"
		size=$line
		first_line "${folder}mode"
		case $size in
		0) ;;
		*[!0-9]* | "") echo "${name##*/}" ;;
		*) echo "${name##*/}$tab$((size / 1048576)) MiB${line:+, $line}" ;;
		esac
	done
}

free_on_bus() { # REGION BYTES that are free of each region
	for folder in "$root"/sys/bus/nd/devices/region*/; do
		first_line "${folder}available_size"
		case $line in "" | *[!0-9]*) ;; *) echo "region $line" ;; esac
	done
}

nodes() {
	for folder in "$root"/sys/devices/system/node/node[0-9]*/; do
		name=${folder%/}
		[ -d "$folder" ] && echo "${name##*node}"
	done
}

memory() { # what bench measures by name
	nodes | while read -r node; do echo "node$node"; done
	for device in "$root"/dev/dax[0-9]*; do
		[ -e "$device" ] && echo "/dev/${device##*/}"
	done
}

users() {
	while IFS=: read -r name _ number _; do
		[ "${number:-0}" = 0 ] || [ "$number" -ge 1000 ] && [ "$number" -lt 60000 ] && echo "$name"
	done <"$root/etc/passwd"
}

values() { # KIND
	case $1 in
	reserve)
		most=$(usable | largest)
		[ "$most" = 0 ] && most=$(($(ram) - 4 * gib))
		up_to "$most"
		;;
	offset) usable | while read -r start _; do tight "$start"; done ;;
	ram) up_to "$(ram)" ;;
	guest) up_to $((16 * gib)) ;;
	free) up_to "$(free_on_bus | largest)" ;;
	pmem) pmem ;;
	memory) memory; echo @files ;;
	pmem-or-folder) pmem; mounted ;;
	mounted) mounted ;;
	item) reservations ;;
	namespace) bus namespace; pmem ;;
	region) bus region ;;
	node) nodes ;;
	user) users ;;
	file) echo @files ;;
	folder) echo @folders ;;
	=*) for word in ${1#=}; do echo "$word"; done | while IFS=, read -r word; do echo "$word"; done ;;
	esac
}

# The words so far ---------------------------------------------------------------------------------------------

offer() { # PREFIX, lines on standard input: those that begin so, each once
	seen="$tab"
	while IFS= read -r line; do
		word=${line%%"$tab"*}
		case $word in
		@*) echo "$word" ;;
		"$1"*)
			case $seen in
			*"$tab$word$tab"*) ;;
			*)
				seen="$seen$word$tab"
				echo "$line"
				;;
			esac
			;;
		esac
	done
}

command=
kind=
places=0
used=" "
while [ $# -gt 1 ]; do
	word=$1
	shift
	if [ -n "$kind" ]; then # the value of the option before
		kind=
		continue
	fi
	case $word in
	--)
		if [ "$(takes_others "$command")" = yes ]; then
			echo @files
			exit 0
		fi
		;;
	-*)
		used="$used$word "
		case $word in
		*=*) ;;
		*) kind=$(kind_of "$command" "$word") ;;
		esac
		;;
	*)
		longer="${command:+$command }$word"
		case "$end$(commands "$command")" in
		*"$end$word$tab"*) command=$longer ;;
		*) places=$((places + 1)) ;;
		esac
		;;
	esac
done

now=${1-}
if [ -n "$kind" ]; then
	values "$kind" | offer "$now"
	exit 0
fi
case $now in
--*=*)
	values "$(kind_of "$command" "${now%%=*}")" | offer "${now#*=}"
	exit 0
	;;
-*) ;;
*)
	place=$(place_of "$command" "$places")
	if [ -n "$(commands "$command")" ]; then
		commands "$command" | offer "$now"
		exit 0
	elif [ -n "$place" ]; then
		values "$place" | offer "$now"
		exit 0
	fi
	;;
esac
options "$command" | while IFS= read -r line; do
	word=${line%%"$tab"*}
	case " $(repeated "$command") " in
	*" $word "*) echo "$line" ;;
	*) case $used in *" $word "*) ;; *) echo "$line" ;; esac ;;
	esac
done | offer "$now"
